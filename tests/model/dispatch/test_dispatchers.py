"""Every fast path equals the loop, in outputs and in every gradient."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch import (
    Dispatcher,
    GroupedDispatcher,
    LoopDispatcher,
    PaddedDispatcher,
    SegmentDispatcher,
)
from lightning_moevlm.model.experts import ExpertStack, GatedExperts, MLPExperts
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.routers import TopKRouter
from tests.routing import limited, routing_input, top_1_plan

FAST = [SegmentDispatcher(), GroupedDispatcher(), PaddedDispatcher()]
DISPATCHERS = [LoopDispatcher(), *FAST]
EXPERTS: dict[str, Callable[[int], ExpertStack]] = {
    "mlp": lambda num_experts: MLPExperts(16, num_experts, 32),
    "gated": lambda num_experts: GatedExperts(16, num_experts, 32),
}


class Result(NamedTuple):
    out_TD: Tensor
    gradients: dict[str, Tensor]


def run(dispatcher: Dispatcher, experts: ExpertStack, top_k: int, num_padding: int, factor: float | None) -> Result:
    router = TopKRouter(16, experts.num_experts, top_k)
    initialise(router, seed=1, std=0.5)
    initialise(experts, seed=2, std=0.3)
    inputs = routing_input(64, 16, num_padding=num_padding)
    tokens_TD = inputs.tokens_TD.requires_grad_()
    plan: PairPlan = router(inputs)
    if factor is not None:
        plan = limited(plan, factor)
    out_TD = dispatcher(plan, tokens_TD, experts)
    (out_TD * torch.linspace(-1, 1, 16)).sum().backward()
    parameters = {**dict(router.named_parameters()), **dict(experts.named_parameters())}
    gradients = {name: parameter.grad for name, parameter in parameters.items()} | {"tokens": tokens_TD.grad}
    assert all(gradient is not None for gradient in gradients.values())
    return Result(out_TD.detach(), gradients)


@pytest.mark.parametrize("fast", FAST, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("num_experts", [1, 4, 16])
@pytest.mark.parametrize(("top_k", "factor"), [(1, None), (2, None), (2, 0.5)])
def test_fast_path_equals_loop(fast: Dispatcher, kind: str, num_experts: int, top_k: int, factor: float | None) -> None:
    top_k = min(top_k, num_experts)
    slow = run(LoopDispatcher(), EXPERTS[kind](num_experts), top_k, 5, factor)
    quick = run(fast, EXPERTS[kind](num_experts), top_k, 5, factor)
    torch.testing.assert_close(quick.out_TD, slow.out_TD)
    for name, gradient in slow.gradients.items():
        torch.testing.assert_close(quick.gradients[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda d: type(d).__name__)
def test_one_expert_by_hand(dispatcher: Dispatcher) -> None:
    # dim 4 (grouped_mm wants multiples of 4), every weight 1: up gives the sum s of a token in each hidden unit,
    # GELU of a large s is s, down sums F = 4 units: 4 s. Weight 0.5: 2 s.
    # Tokens (10, 0, 0, 0) and (0, 20, 20, 0): 20 and 80.
    experts = MLPExperts(4, 1, 4)
    for parameter in experts.parameters():
        torch.nn.init.ones_(parameter)
    tokens_TD = torch.tensor([[10.0, 0, 0, 0], [0, 20.0, 20.0, 0]])
    plan = top_1_plan(torch.zeros(2, 1))._replace(weight_N=torch.tensor([0.5, 0.5]))
    expected_TD = torch.tensor([[20.0] * 4, [80.0] * 4])
    torch.testing.assert_close(dispatcher(plan, tokens_TD, experts), expected_TD)


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda d: type(d).__name__)
def test_padding_and_dropped_pairs_come_out_as_zeros(dispatcher: Dispatcher) -> None:
    experts = MLPExperts(16, 4, 32)
    initialise(experts, seed=0, std=0.3)
    logits_TE = torch.zeros(10, 4).index_fill(1, torch.tensor([2]), 9.0)  # all tokens choose expert 2
    plan = top_1_plan(logits_TE, valid_T=torch.arange(10) < 8)
    some = limited(plan, 1.0)  # capacity ceil(1.0 * 8 / 4) = 2
    out_TD = dispatcher(some, torch.randn(10, 16, generator=torch.Generator().manual_seed(0)), experts)
    assert bool((out_TD[:2] != 0).any(dim=-1).all())
    assert torch.equal(out_TD[2:], torch.zeros(8, 16))


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(dispatcher: Dispatcher, num_tokens: int) -> None:
    experts = MLPExperts(16, 4, 32)
    initialise(experts, seed=0)
    tokens_TD = torch.ones(num_tokens, 16, requires_grad=True)
    out_TD = dispatcher(top_1_plan(torch.zeros(num_tokens, 4)), tokens_TD, experts)
    out_TD.sum().backward()
    assert out_TD.shape == (num_tokens, 16)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in experts.parameters())


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda d: type(d).__name__)
def test_empty_expert_gives_zero_gradient_and_no_nan(dispatcher: Dispatcher) -> None:
    # SM3Det issue 22: a small batch left an expert empty and its mean became NaN
    experts = MLPExperts(16, 4, 32)
    initialise(experts, seed=0, std=0.3)
    logits_TE = torch.zeros(6, 4).index_fill(1, torch.tensor([0]), 9.0)
    dispatcher(top_1_plan(logits_TE), torch.ones(6, 16), experts).square().sum().backward()
    assert float(experts.up_EDF.grad[0].abs().sum()) > 0
    assert torch.equal(experts.up_EDF.grad[1:], torch.zeros(3, 16, 32))


@pytest.mark.parametrize("fast", FAST, ids=lambda d: type(d).__name__)
def test_bf16_autocast_equals_loop(fast: Dispatcher) -> None:
    # ReMoE issue 11: the grouped product failed in bf16 where fp32 worked
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slow = run(LoopDispatcher(), EXPERTS["mlp"](4), 2, 0, None)
        quick = run(fast, EXPERTS["mlp"](4), 2, 0, None)
    assert quick.out_TD.dtype == torch.float32
    torch.testing.assert_close(quick.out_TD, slow.out_TD, atol=2e-3, rtol=2e-2)


def test_grouped_refuses_widths_that_its_kernel_cannot_run() -> None:
    experts = MLPExperts(6, 2, 8)
    initialise(experts, seed=0)
    with pytest.raises(UserError, match=r"width 6 in torch\.float32: widths must be multiples of 4"):
        GroupedDispatcher()(top_1_plan(torch.zeros(3, 2)), torch.ones(3, 6), experts)
