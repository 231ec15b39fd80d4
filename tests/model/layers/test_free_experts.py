"""Zero, copy and constant experts: by hand, in a layer with every dispatcher, and steered by a bias."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.model.dispatch import (
    AutoDispatcher,
    Capacity,
    Dispatcher,
    GroupedDispatcher,
    LoopDispatcher,
    PaddedDispatcher,
    SegmentDispatcher,
)
from lightning_moevlm.model.experts import FreeExperts, MLPExperts
from lightning_moevlm.model.layers import MoEFFN, check_causal, initialise
from lightning_moevlm.model.routers import SMEBU, QuantileUpdate, Router, SigmoidBiasRouter, SoftRouter, TopKRouter
from lightning_moevlm.model.routers.choices import make_plan
from tests.routing import NOTHING, routing_input

TOP_3: Callable[[int, int], Router] = partial(TopKRouter, top_k=3)


def moe(
    router: Callable[[int, int], Router] = TOP_3,
    free: Callable[[int], FreeExperts] | None = FreeExperts,
    capacity: Capacity | None = None,
    dispatcher: Dispatcher | None = None,
) -> MoEFFN:
    layer = MoEFFN(
        16, 4, router, partial(MLPExperts, hidden_dim=8), capacity=capacity, dispatcher=dispatcher, free=free
    )
    initialise(layer, seed=0, std=0.3)
    return layer


TOKENS = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
VALID = torch.arange(6).expand(3, 6) < torch.tensor([[6], [5], [3]])
LAYOUT = Layout((Span(Modality.IMAGE, 0, 4), Span(Modality.TEXT, 4, 6)), VALID)


def test_free_experts_by_hand() -> None:
    # two others, then zero, copy and constant. The constant's W is 0, so it is half of x and half of v = (10, 20)
    free = FreeExperts(2, num_zero=1, num_copy=1, num_constant=1)
    assert free.constant is not None and free.mix is not None
    with torch.no_grad():
        free.constant.copy_(torch.tensor([[10.0, 20.0]]))
        free.mix.zero_()
    tokens_TD = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    expert_TK = torch.tensor([[3, 0], [4, 1], [2, 3], [0, 1], [3, 4]])
    weight_TK = torch.tensor([[0.5, 0.2], [0.4, 0.3], [0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    inputs = routing_input(5, 2)._replace(valid_T=torch.tensor([True, True, True, True, False]))
    plan = make_plan(inputs, torch.zeros(5, 5), torch.full((5, 5), 0.2), expert_TK, weight_TK)
    # 0.5 x; 0.4 (x + v) / 2 = 0.2 (11, 22); 0.9 * 0 + 0.1 x; nothing; padding
    expected = torch.tensor([[0.5, 1.0], [2.2, 4.4], [0.1, 0.2], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(free(plan, tokens_TD), expected)


@pytest.mark.parametrize(
    "dispatcher",
    [SegmentDispatcher(), GroupedDispatcher(), PaddedDispatcher(), AutoDispatcher()],
    ids=lambda dispatcher: type(dispatcher).__name__,
)
def test_every_dispatcher_leaves_free_experts_out(dispatcher: Dispatcher) -> None:
    results = []
    for each in (LoopDispatcher(), dispatcher):
        layer = moe(dispatcher=each)
        output = layer(TOKENS, LAYOUT)
        output.tokens_BSD.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients.values())
        assert torch.equal(output.tokens_BSD[~VALID], torch.zeros(4, 16))
        results.append([output.tokens_BSD.detach(), *gradients.values()])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


def test_a_layer_is_the_sum_of_both_kinds() -> None:
    layer = moe()
    plan = layer(TOKENS, LAYOUT).plans[0].plan
    assert isinstance(plan, PairPlan) and plan.num_experts == 8 and plan.chosen_loads().sum() == 3 * 14
    tokens_TD = TOKENS.reshape(18, 16)
    expected = layer.free(plan, tokens_TD)  # type: ignore[misc]
    for pair in plan.kept_N.nonzero().flatten().tolist():
        token, expert = int(plan.token_N[pair]), int(plan.expert_N[pair])
        if expert < 4:
            weights = tuple(stack[expert] for stack in layer.experts.stacks())
            row = layer.experts.run(tokens_TD[token : token + 1], weights, torch.matmul)[0]
            expected = expected.index_add(0, torch.tensor([token]), (plan.weight_N[pair] * row).unsqueeze(0))
    torch.testing.assert_close(layer(TOKENS, LAYOUT).tokens_BSD.reshape(18, 16), expected)


def test_capacity_limits_the_others_alone() -> None:
    free_plan = moe(capacity=Capacity(0.25))(TOKENS, LAYOUT).plans[0].plan
    is_free_N = free_plan.expert_N >= 4
    assert bool(free_plan.kept_N[is_free_N & free_plan.chosen_N].all())
    chosen = int(free_plan.chosen_N[~is_free_N].sum())
    # places are a share of what the four others are asked for: ceil(0.25 * pairs / 4)
    assert int(free_plan.kept_loads()[0][:4].max()) == -(-chosen // 16)


@pytest.mark.slow  # compiles for seconds
def test_compiled_it_is_one_graph_and_gives_the_same() -> None:
    layer = moe(partial(SigmoidBiasRouter, top_k=3))
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(TOKENS, LAYOUT).tokens_BSD, layer(TOKENS, LAYOUT).tokens_BSD)


def test_costs_count_the_experts_that_compute() -> None:
    # 3 choices of 4 + 4 experts at even loads: 1.5 of them compute; with a target of 2.4 that many do
    assert moe().router.computing_per_token == 1.5
    layer, plain = moe(partial(SigmoidBiasRouter, top_k=3, target_k=2.4)), moe(free=None)
    assert layer.router.computing_per_token == 2.4 and plain.router.computing_per_token == 3.0
    tokens = {Modality.IMAGE: 4}
    assert layer.costs(tokens).experts == pytest.approx(plain.costs(tokens).experts * 2.4 / 3)
    assert layer.costs(tokens).router == 2 * plain.costs(tokens).router
    assert layer.idle_parameters() == pytest.approx(0.4 * 4 * 2 * 16 * 8)


def test_bias_aims_at_the_target_by_hand() -> None:
    # experts 0 and 1 compute, 2 and 3 are free; of 8 pairs, two per token, half shall compute: 2 for each of the two.
    # loads 4 and 2: u (2 - 4) / 2 = -u and 0; free ones stay
    router = SigmoidBiasRouter(4, 4, update_rate=0.1, update="proportional", recentre=False, target_k=1.0)
    router.set_free(2)
    router.rebalance(torch.tensor([[3, 1, 1, 0], [1, 1, 0, 1]]), NOTHING)
    torch.testing.assert_close(router.bias_AE, torch.tensor([[-0.1, 0.0, 0.0, 0.0]]))
    # without a target at equal loads, 8 / 4 = 2, which is the same here
    even = SigmoidBiasRouter(4, 4, update_rate=0.1, recentre=False)
    even.set_free(2)
    even.rebalance(torch.tensor([[3, 0, 1, 0], [1, 1, 1, 1]]), NOTHING)
    torch.testing.assert_close(even.bias_AE, torch.tensor([[-0.1, 0.1, 0.0, 0.0]]))


@pytest.mark.parametrize("target", [0.5, 1.6])
def test_the_bias_steers_how_many_experts_compute(target: float) -> None:
    router = SigmoidBiasRouter(16, 8, top_k=2, update_rate=0.02, update="proportional", target_k=target)
    router.set_free(4)
    initialise(router, seed=0, std=0.5)
    inputs = routing_input(512, 16, num_padding=12)
    computing = []
    for _ in range(200):
        load_AE = router(inputs).chosen_loads(inputs.modality_T, 2)
        computing.append(float(load_AE[:, :4].sum()) / 500)
        router.rebalance(load_AE, NOTHING)
    assert abs(computing[0] - target) > 0.3
    assert sum(computing[-20:]) / 20 == pytest.approx(target, abs=0.05)


@pytest.mark.parametrize(
    ("message", "build"),
    [
        ("SoftRouter mixes tokens and chooses none", lambda: moe(SoftRouter)),
        ("moe.free has no expert", lambda: FreeExperts(16, 0, 0, 0)),
        ("moe.free.num_copy is -1", lambda: FreeExperts(16, num_copy=-1)),
        (
            "no expert is: set router.target_k to null, or moe.free",
            lambda: moe(partial(SigmoidBiasRouter, target_k=1.0), free=None),
        ),
        ("target_k is 3", lambda: moe(partial(SigmoidBiasRouter, target_k=3.0))),
        ("update SMEBU makes the loads of all", lambda: moe(partial(SigmoidBiasRouter, update=SMEBU()))),
        ("update QuantileUpdate makes", lambda: moe(partial(SigmoidBiasRouter, update=QuantileUpdate()))),
        (
            "a causal model cannot limit capacity with moe.free",
            lambda: check_causal(moe(partial(TopKRouter, top_k=1), capacity=Capacity())),
        ),
    ],
)
def test_what_does_not_fit_is_refused(message: str, build: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=message):
        build()
