"""How balancing biases move: by hand, and until loads are even."""

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.routers import SMEBU, GroupLimit, QuantileUpdate, SigmoidBiasRouter
from lightning_moevlm.model.routers.quantile_update import count_required_bias, solve_bias
from tests.routing import NOTHING, routing_input


def test_bias_update_by_hand() -> None:
    # loads 6, 2, 1: mean 3. sign: -u, +u, +u; proportional: -3/3 u, 1/3 u, 2/3 u
    load_AE = torch.tensor([[4, 2, 0], [2, 0, 1]])
    sign = SigmoidBiasRouter(4, 3, update_rate=0.1, recentre=False)
    sign.rebalance(load_AE, NOTHING)
    torch.testing.assert_close(sign.bias_AE, torch.tensor([[-0.1, 0.1, 0.1]]))
    proportional = SigmoidBiasRouter(4, 3, update_rate=0.3, update="proportional", recentre=False)
    proportional.rebalance(load_AE, NOTHING)
    torch.testing.assert_close(proportional.bias_AE, torch.tensor([[-0.3, 0.1, 0.2]]))
    # torchtitan issue 1506: the mean of the bias drifted
    centred = SigmoidBiasRouter(4, 3, update_rate=0.1)
    for _ in range(100):
        centred.rebalance(load_AE, NOTHING)
    assert float(centred.bias_AE.mean()) == pytest.approx(0.0, abs=1e-5)


def test_bias_is_state_and_takes_no_gradient() -> None:
    # KempnerForge: a trainable bias inside the sigmoid
    router = SigmoidBiasRouter(4, 3)
    assert "bias_AE" in router.state_dict() and "bias_AE" not in dict(router.named_parameters())


@pytest.mark.parametrize(
    ("router", "steps"),
    [
        (SigmoidBiasRouter(16, 8, top_k=1, update_rate=0.01), 300),
        (SigmoidBiasRouter(16, 8, top_k=1, update_rate=0.01, update=SMEBU()), 300),
        (SigmoidBiasRouter(16, 8, top_k=1, update=QuantileUpdate()), 10),
        (SigmoidBiasRouter(16, 8, top_k=1, update=QuantileUpdate(memory=0.5)), 20),
    ],
    ids=["sign", "SMEBU", "quantile", "quantile with memory"],
)
def test_rebalancing_evens_out_a_lopsided_router(router: SigmoidBiasRouter, steps: int) -> None:
    initialise(router, seed=0, std=0.5)
    inputs = routing_input(512, 16)
    inputs = inputs._replace(tokens_TD=inputs.tokens_TD + 1.0)
    violation = []
    for _ in range(steps):
        plan = router(inputs)
        load_AE = plan.chosen_loads(plan.modality_T, 2)
        load_E = load_AE.sum(dim=0)
        violation.append(float(load_E.max() / load_E.float().mean() - 1))
        router.rebalance(load_AE, router.tally(plan))
    assert violation[0] > 1.0 and violation[-1] < 0.2
    assert float(router.bias_AE.mean()) == pytest.approx(0.0, abs=1e-5)


def test_bias_per_modality_moves_by_its_own_load() -> None:
    router = SigmoidBiasRouter(4, 2, top_k=1, update_rate=0.5, recentre=False, per_modality=True)
    router.rebalance(torch.tensor([[4, 2], [0, 6]]), NOTHING)  # means 3 and 3
    torch.testing.assert_close(router.bias_AE, torch.tensor([[-0.5, 0.5], [0.5, -0.5]]))
    with torch.no_grad():
        router.weight_ED.zero_()  # all scores equal
    plan = router.eval()(routing_input(8, 4))
    assert torch.equal(plan.expert_N, torch.tensor([1, 0] * 4))  # images prefer 1, texts 0


def test_smebu_by_hand() -> None:
    # loads 6, 2, 1: v = -1, 1/3, 2/3; tanh 2v = -0.96403, 0.58278, 0.87006 less their mean 0.16294, times 0.1
    load_AE, step_E = torch.tensor([[4, 2, 0], [2, 0, 1]]), torch.tensor([-0.112697, 0.041984, 0.070712])
    router = SigmoidBiasRouter(4, 3, update_rate=0.1, update=SMEBU())
    router.rebalance(load_AE, NOTHING)  # m = d / 2
    torch.testing.assert_close(router.bias_AE[0], step_E / 2, rtol=0, atol=1e-6)
    router.rebalance(load_AE, NOTHING)  # m = d / 4 + d / 2
    torch.testing.assert_close(router.bias_AE[0], step_E * 1.25, rtol=0, atol=1e-6)
    torch.testing.assert_close(router.momentum_AE[0], step_E * 0.75, rtol=0, atol=1e-6)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    assert {"bias_AE", "momentum_AE"} < before.keys()
    router.rebalance(torch.zeros_like(load_AE), NOTHING)  # no token, no change
    assert all(torch.equal(tensor, before[name]) for name, tensor in router.state_dict().items())


def test_smebu_per_modality_moves_by_its_own_load() -> None:
    # images 3 : 1, v = -1/2, 1/2, tanh 2v = -+0.761594; no text, so its row stays
    router = SigmoidBiasRouter(4, 2, top_k=1, update_rate=1.0, update=SMEBU(beta=0.0), per_modality=True)
    router.rebalance(torch.tensor([[3, 1], [0, 0]]), NOTHING)
    torch.testing.assert_close(router.bias_AE, torch.tensor([[-0.761594, 0.761594], [0.0, 0.0]]))


def test_quantile_by_hand() -> None:
    # top-1 of 2 experts; the second largest score is expert 1's, so r_t0 = s_1 - s_0 and r_t1 = 0. Bins are 0.5 wide
    # and start at -1: r_t0 = -0.8, -0.6 | -0.3, -0.1 has two tokens in each of the first two. Half of the tokens lie
    # below the end of the first, -0.5; the four zeros are in the third, [0, 0.5), whose half is 0.25
    scores_TE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.4], [0.6, 0.5]])
    bias_AE, row_T, valid_T = torch.zeros(1, 2), torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    histogram = count_required_bias(scores_TE, bias_AE, row_T, valid_T, 1, 4)
    assert histogram.tolist() == [[[2, 2, 0, 0], [0, 0, 4, 0]]]
    torch.testing.assert_close(solve_bias(histogram, bias_AE, 1 / 2), torch.tensor([[-0.5, 0.25]]))
    # with a bias of (-0.4, 0.4) expert 1 comes first for all, as no difference exceeds 0.8: a_t = s_0 - 0.4 = 0.5, 0.4,
    # 0.3, 0.2. Bins are 0.7 wide from -1.4
    biased_AE = torch.tensor([[-0.4, 0.4]])
    histogram = count_required_bias(scores_TE, biased_AE, row_T, valid_T, 1, 4)
    # a - s_0 = -0.4 to -0.4: bin 1; a - s_1 = 0.4, 0.2, -0.1, -0.3: bins 2, 2, 1, 1
    assert histogram.tolist() == [[[0, 4, 0, 0], [0, 2, 2, 0]]]
    torch.testing.assert_close(solve_bias(histogram, biased_AE, 1 / 2), torch.tensor([[-0.35, 0.0]]))


def test_quantile_update_is_centred_and_remembers() -> None:
    # solved: -0.5 and 0.25, as above; less their mean -0.125. With a memory of 0.2: 0.8 of it
    histogram = torch.tensor([2, 2, 0, 0, 0, 0, 4, 0])
    for memory, part in ((0.0, 1.0), (0.2, 0.8)):
        router = SigmoidBiasRouter(4, 2, top_k=1, update=QuantileUpdate(memory, num_bins=4))
        router.rebalance(NOTHING, histogram)
        torch.testing.assert_close(router.bias_AE, part * torch.tensor([[-0.375, 0.375]]))
    router.rebalance(NOTHING, torch.zeros_like(histogram))  # no token, no change
    torch.testing.assert_close(router.bias_AE, 0.8 * torch.tensor([[-0.375, 0.375]]))


def test_quantiles_are_those_of_the_step_however_it_is_cut() -> None:
    router = SigmoidBiasRouter(16, 8, update=QuantileUpdate(), per_modality=True)
    initialise(router, seed=0, std=0.5)
    router.bias_AE.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(0))
    whole = routing_input(4000, 16)
    plan = router(whole)
    halves = [
        router(
            whole._replace(
                tokens_TD=whole.tokens_TD[part],
                modality_T=whole.modality_T[part],
                valid_T=whole.valid_T[part],
                num_sequences=2,
            )
        )
        for part in (slice(0, 2000), slice(2000, 4000))
    ]
    tally = router.tally(plan)
    assert torch.equal(tally, router.tally(halves[0]) + router.tally(halves[1]))
    # against torch's own quantile of the same values, within a bin of (2 + 0.4) / 1000 and the gap of two tokens
    solved_AE = solve_bias(tally.view(2, 8, 1000), router.bias_AE, 2 / 8)
    scores_TE = plan.logits_TE.detach().sigmoid()
    for modality in range(2):
        mine_TE = scores_TE[plan.modality_T == modality]
        cutoff_T1 = (mine_TE + router.bias_AE[modality]).sort(dim=-1, descending=True).values[:, 2:3]
        exact_E = torch.quantile(cutoff_T1 - mine_TE, 2 / 8, dim=0)
        torch.testing.assert_close(solved_AE[modality], exact_E, rtol=0, atol=0.005)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("with router.top_k 8 of 8 every token gets all", {"top_k": 8}),
        ("does not know how groups cut off experts", {"groups": GroupLimit(2, 1)}),
        ("score sqrt_softplus has no upper end", {"score": "sqrt_softplus"}),
    ],
)
def test_quantiles_that_cannot_be_solved_are_refused(message: str, options: dict) -> None:
    with pytest.raises(UserError, match=message):
        SigmoidBiasRouter(16, 8, update=QuantileUpdate(), **options)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (QuantileUpdate, {"memory": 1.0}),
        (QuantileUpdate, {"num_bins": 1}),
        (SMEBU, {"kappa": 0.0}),
        (SMEBU, {"beta": 1.0}),
    ],
)
def test_impossible_options_of_an_update_are_refused(rule: type, options: dict) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"router.update.{name} is {value}"):
        rule(**options)
