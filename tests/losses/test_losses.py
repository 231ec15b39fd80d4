"""Losses by hand, their gradients, and the traps that peers fell into."""

import pytest
import torch

from lightning_moevlm.losses import (
    AuxiliaryLosses,
    GlobalEntropy,
    Importance,
    LoadBalance,
    LocalEntropy,
    RouterZ,
    importance,
    load_balance,
    router_z,
)
from lightning_moevlm.plans import Modality, PairPlan
from tests.routing import top_1_plan

LOSSES = {
    "load_balance": load_balance,
    "router_z": router_z,
    "importance": importance,
    "local_entropy": LocalEntropy(modalities=("image", "text")),
    "global_entropy": GlobalEntropy(),
}


def test_load_balance_by_hand() -> None:
    # two experts, three tokens with p = (3/4, 1/4), (3/4, 1/4), (1/4, 3/4): chosen 0, 0, 1.
    # f = (2/3, 1/3), P = (7/12, 5/12): 2 (14/36 + 5/36) = 38/36
    probs_TE = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]) / 4
    torch.testing.assert_close(load_balance(top_1_plan(probs_TE.log())), torch.tensor(38 / 36))


def test_load_balance_is_one_when_even() -> None:
    assert float(load_balance(top_1_plan(torch.eye(4) * 3.0))) == pytest.approx(1.0)


def test_load_balance_counts_all_probability_not_the_chosen_alone() -> None:
    # aprender issue 2162: with P over the chosen k only, the sum of P would be 1/2 here and the loss 0.5, not 1
    assert float(load_balance(top_1_plan(torch.zeros(6, 2)))) == pytest.approx(1.0)


def test_load_balance_ignores_what_capacity_dropped() -> None:
    # the router is judged by what it asked for: dropping pairs must not make it look balanced
    plan = top_1_plan(torch.tensor([[2.0, 0.0]]).expand(4, 2))
    dropped = plan._replace(kept_N=torch.tensor([True, False, False, False]))
    assert torch.equal(load_balance(plan), load_balance(dropped))


def test_router_z_by_hand() -> None:
    # logsumexp(ln 1, ln 3) = ln 4; logsumexp(0, 0) = ln 2: mean of squares
    plan = top_1_plan(torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log())
    ln2 = torch.tensor(2.0).log()
    torch.testing.assert_close(router_z(plan), ((2 * ln2) ** 2 + ln2**2) / 2)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_not_in_the_loss(name: str) -> None:
    logits_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    padded_TE = torch.cat([logits_TE, torch.full((3, 4), 50.0)])
    padded = top_1_plan(padded_TE, valid_T=torch.arange(9) < 6)
    torch.testing.assert_close(LOSSES[name](padded), LOSSES[name](top_1_plan(logits_TE)))


@pytest.mark.parametrize("name", LOSSES)
def test_no_valid_token_gives_zero_not_nan(name: str) -> None:
    plan = top_1_plan(torch.zeros(3, 4), valid_T=torch.zeros(3, dtype=torch.bool))
    assert float(LOSSES[name](plan)) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_in_float64(name: str) -> None:
    logits_TE = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def loss(values_TE: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](top_1_plan(values_TE))

    assert torch.autograd.gradcheck(loss, (logits_TE,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_gradient_is_finite_for_a_zero_router_and_reaches_logits(name: str, scale: float) -> None:
    # vmoe pull request 218: NaN gradient at perfect balance; Automodel issue 1408: no gradient at all
    logits_TE = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).mul(scale).requires_grad_()
    LOSSES[name](top_1_plan(logits_TE)).backward()
    assert bool(logits_TE.grad.isfinite().all())
    if scale:
        assert float(logits_TE.grad.abs().sum()) > 0


def test_importance_by_hand() -> None:
    # p = (3/4, 1/4) and (1/4, 3/4) is even: 0. Twice the first: I = (3/2, 1/2), mean 1, variance 1/4
    even = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    assert float(importance(top_1_plan(even))) == pytest.approx(0.0, abs=1e-7)
    assert float(importance(top_1_plan(even[[0, 0]]))) == pytest.approx(0.25)


def mixed_plan() -> PairPlan:
    """Two image tokens, sure of experts 0 and 1; two text tokens, undecided between 0 and 1."""
    probs_TE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    plan = top_1_plan(torch.zeros(4, 2))
    modality_T = torch.tensor([Modality.IMAGE, Modality.IMAGE, Modality.TEXT, Modality.TEXT])
    return plan._replace(probs_TE=probs_TE, modality_T=modality_T)


def test_modality_entropies_by_hand() -> None:
    ln2 = float(torch.tensor(2.0).log())
    plan = mixed_plan()
    assert float(LocalEntropy(modalities=("image",))(plan)) == pytest.approx(0.0, abs=1e-6)
    assert float(LocalEntropy(modalities=("text",))(plan)) == pytest.approx(ln2)
    assert float(LocalEntropy(modalities=("image", "text"))(plan)) == pytest.approx(ln2 / 2)
    assert float(GlobalEntropy()(plan)) == pytest.approx(0.0, abs=1e-6)  # both modalities use both experts
    collapsed = plan._replace(probs_TE=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))
    assert float(GlobalEntropy(modalities=("text",))(collapsed)) == pytest.approx(ln2)
    assert float(GlobalEntropy()(collapsed)) == pytest.approx(ln2 / 2)


def test_global_entropy_is_content_above_its_threshold() -> None:
    # e^tau = 1.5 experts: ln 1.5 is below the ln 2 that text uses
    assert float(GlobalEntropy(min_experts=1.5)(mixed_plan())) == 0.0


def test_a_modality_that_is_absent_does_not_dilute_the_mean() -> None:
    # LIMoE's pooled balance hides the collapse of the smaller modality; here a missing one must not halve the other
    plan = mixed_plan()
    text_only = plan._replace(valid_T=plan.modality_T == Modality.TEXT)
    both = LocalEntropy(modalities=("image", "text"))
    assert float(both(text_only)) == pytest.approx(float(torch.tensor(2.0).log()))


def random_plans(count: int) -> list[PairPlan]:
    generator = torch.Generator().manual_seed(0)
    return [top_1_plan(torch.randn(8, 4, generator=generator)) for _ in range(count)]


def test_scale_does_not_move_with_the_number_of_layers() -> None:
    # transformers issues 28255, 29503 and 31464: layers were concatenated before averaging
    plan = random_plans(1)[0]
    one, three = AuxiliaryLosses().terms([plan]), AuxiliaryLosses().terms([plan] * 3)
    for name in one:
        torch.testing.assert_close(one[name].raw, three[name].raw)


def test_terms_are_means_over_plans_with_their_weights() -> None:
    plans = random_plans(2)
    terms = AuxiliaryLosses(LoadBalance(0.5), RouterZ(0.25)).terms(plans)
    torch.testing.assert_close(terms["load_balance"].raw, (load_balance(plans[0]) + load_balance(plans[1])) / 2)
    # transformers issues 44242 and 44243: a coefficient was silently ignored
    torch.testing.assert_close(terms["router_z"].weighted, (router_z(plans[0]) + router_z(plans[1])) / 2 * 0.25)


def test_null_turns_one_loss_off_and_leaves_the_other() -> None:
    assert list(AuxiliaryLosses(load_balance=None).terms(random_plans(1))) == ["router_z"]
    three = AuxiliaryLosses(importance=Importance(), router_z=None, local_entropy=LocalEntropy())
    assert list(three.terms(random_plans(1))) == ["load_balance", "importance", "local_entropy"]
    assert list(AuxiliaryLosses(router_z=None).terms(random_plans(1))) == ["load_balance"]


def test_a_dense_model_has_no_terms() -> None:
    assert AuxiliaryLosses().terms([]) == {}
