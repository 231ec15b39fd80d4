"""What a fast path must survive: double precision, checkpointing, compile, foreign experts, plans of every shape."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch import (
    Capacity,
    Dispatcher,
    GroupedDispatcher,
    LoopDispatcher,
    ModalityFactors,
    PaddedDispatcher,
    SegmentDispatcher,
)
from lightning_moevlm.model.experts import ExpertStack, GatedExperts, Linear, MLPExperts
from lightning_moevlm.model.layers import MoEFFN, initialise
from lightning_moevlm.model.routers import ExpertChoiceRouter, TopKRouter, TopPRouter
from tests.routing import limited, routing_input, top_1_plan

FAST = [SegmentDispatcher(), GroupedDispatcher(), PaddedDispatcher(), PaddedDispatcher(factor=8.0)]
DISPATCHERS = [LoopDispatcher(), *FAST]


def name(dispatcher: Dispatcher) -> str:
    return type(dispatcher).__name__ + (" fixed" if getattr(dispatcher, "factor", None) else "")


class BiasedExperts(ExpertStack):
    """A stack of another package: an activation of three stages, a bias, so that a row of zeros gives no zeros."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts, hidden_dim=24)
        self.one_EDF = nn.Parameter(torch.empty(num_experts, dim, 24))
        self.two_EFF = nn.Parameter(torch.empty(num_experts, 24, 24))
        self.three_EFD = nn.Parameter(torch.empty(num_experts, 24, dim))
        self.shift = nn.Parameter(torch.empty(24))

    def stacks(self) -> tuple[Tensor, ...]:
        return self.one_EDF, self.two_EFF, self.three_EFD

    def run(self, rows_ND: Tensor, weights: tuple[Tensor, ...], linear: Linear) -> Tensor:
        one, two, three = weights
        return linear(torch.tanh(linear(F.relu(linear(rows_ND, one) + self.shift), two)), three) + 1.0

    def forward_flops_per_row(self) -> int:
        return 0


def gradients(dispatcher: Dispatcher, experts: ExpertStack, plan: PairPlan, tokens_TD: Tensor) -> list[Tensor]:
    """Output, then gradients of tokens, gate weights and every parameter."""
    tokens_TD = tokens_TD.clone().requires_grad_()
    weight_N = plan.weight_N.detach().clone().requires_grad_()
    experts.zero_grad(set_to_none=True)
    out_TD = dispatcher(plan._replace(weight_N=weight_N), tokens_TD, experts)
    (out_TD * torch.linspace(-1, 1, out_TD.shape[1], dtype=out_TD.dtype)).sum().backward()
    grads = [tokens_TD.grad, weight_N.grad, *(parameter.grad for parameter in experts.parameters())]
    return [out_TD.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)]


def plans() -> dict[str, PairPlan]:
    inputs = routing_input(48, 16, num_padding=5)
    routers = {
        "top-2": TopKRouter(16, 8, 2),
        "top-p": TopPRouter(16, 8),
        "expert choice": ExpertChoiceRouter(16, 8, 1.5),
    }
    for router in routers.values():
        initialise(router, seed=1, std=0.5)
    made = {key: router(inputs) for key, router in routers.items()}
    top_2 = made["top-2"]
    one_only = top_2._replace(expert_N=torch.full_like(top_2.expert_N, 3))
    shuffled = torch.randperm(top_2.token_N.shape[0], generator=torch.Generator().manual_seed(0))
    by_pair = {key: getattr(top_2, key)[shuffled] for key in ("token_N", "expert_N", "weight_N", "chosen_N", "kept_N")}
    return {
        **made,
        "all to one expert": one_only,
        "pairs in no order": top_2._replace(**by_pair, num_choices=None),
        "nothing kept": top_2._replace(kept_N=torch.zeros_like(top_2.kept_N)),
        "capacity": limited(top_2, 0.5),
    }


@pytest.mark.parametrize("kind", [MLPExperts, GatedExperts, BiasedExperts])
@pytest.mark.parametrize("plan", plans())
@pytest.mark.parametrize("fast", FAST, ids=name)
def test_fast_path_equals_loop_on_every_plan(fast: Dispatcher, plan: str, kind: type[ExpertStack]) -> None:
    experts = kind(16, 8)  # type: ignore[call-arg]
    initialise(experts, seed=2, std=0.3)
    tokens_TD = routing_input(48, 16, num_padding=5).tokens_TD
    expected = gradients(LoopDispatcher(), experts, plans()[plan], tokens_TD)
    for actual, wanted in zip(gradients(fast, experts, plans()[plan], tokens_TD), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", [MLPExperts, GatedExperts])
@pytest.mark.parametrize("dispatcher", [LoopDispatcher(), SegmentDispatcher(), PaddedDispatcher()], ids=name)
def test_gradients_in_double_precision(dispatcher: Dispatcher, kind: type[ExpertStack]) -> None:
    experts = kind(2, 4, 3).double()  # type: ignore[call-arg]
    initialise(experts, seed=0, std=0.5)
    generator = torch.Generator().manual_seed(0)
    tokens_TD = torch.randn(6, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    plan = top_1_plan(torch.zeros(6, 4))  # expert 3 stays empty, pair 5 is dropped
    plan = plan._replace(expert_N=torch.tensor([0, 1, 0, 2, 1, 0]), kept_N=torch.arange(6) < 5)
    weight_N = torch.rand(6, dtype=torch.float64, generator=generator, requires_grad=True)
    stacks = tuple(experts.parameters())

    def run(tokens_TD: Tensor, weight_N: Tensor, *stacks: Tensor) -> Tensor:
        return dispatcher(plan._replace(weight_N=weight_N), tokens_TD, experts)

    assert torch.autograd.gradcheck(run, (tokens_TD, weight_N, *stacks))


def test_grouped_refuses_double_precision() -> None:
    with pytest.raises(UserError, match=r"no torch\.float64; use fp32, bf16 or fp16"):
        GroupedDispatcher()(top_1_plan(torch.zeros(3, 2)), torch.ones(3, 8, dtype=torch.float64), MLPExperts(8, 2, 8))


@pytest.mark.parametrize("fast", FAST, ids=name)
def test_bf16_weights_and_tokens_equal_loop(fast: Dispatcher) -> None:
    experts = MLPExperts(16, 8)
    initialise(experts, seed=2, std=0.3)
    experts = experts.bfloat16()
    tokens_TD = routing_input(48, 16).tokens_TD.bfloat16()
    expected = gradients(LoopDispatcher(), experts, plans()["top-2"], tokens_TD)
    for actual, wanted in zip(gradients(fast, experts, plans()["top-2"], tokens_TD), expected, strict=True):
        assert actual.dtype == wanted.dtype
        # three products of 8 bits of mantissa each: 2^-8 * 3, about 0.012 of the largest value
        assert float((actual.float() - wanted.float()).abs().max()) <= 0.02 * float(wanted.float().abs().max())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=name)
def test_checkpointing_changes_nothing(dispatcher: Dispatcher, use_reentrant: bool) -> None:
    # Automodel issues 2635 and 3156: the recomputation routed differently
    router, experts = TopKRouter(16, 8, 2), GatedExperts(16, 8, 24)
    initialise(router, seed=1, std=0.5)
    initialise(experts, seed=2, std=0.3)
    inputs = routing_input(48, 16, num_padding=5)

    def layer(tokens_TD: Tensor) -> Tensor:
        return dispatcher(router(inputs._replace(tokens_TD=tokens_TD)), tokens_TD, experts)

    def run(whole: bool) -> list[Tensor]:
        tokens_TD = inputs.tokens_TD.clone().requires_grad_()
        for module in (router, experts):
            module.zero_grad(set_to_none=True)
        out_TD = layer(tokens_TD) if whole else checkpoint(layer, tokens_TD, use_reentrant=use_reentrant)
        out_TD.square().sum().backward()
        return [out_TD.detach(), tokens_TD.grad, *(p.grad for p in (*router.parameters(), *experts.parameters()))]

    for plain, again in zip(run(True), run(False), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=name)
def test_a_second_backward_pass_gives_the_same(dispatcher: Dispatcher) -> None:
    experts = GatedExperts(16, 8, 24)
    initialise(experts, seed=2, std=0.3)
    out_TD = dispatcher(plans()["capacity"], routing_input(48, 16, num_padding=5).tokens_TD, experts)
    first, second = (torch.autograd.grad(out_TD.square().sum(), experts.gate_EDF, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=name)
def test_frozen_experts_let_the_tokens_gradient_through(dispatcher: Dispatcher) -> None:
    experts = MLPExperts(16, 8, 24)
    initialise(experts, seed=2, std=0.3)
    tokens_TD = routing_input(48, 16).tokens_TD
    free = gradients(dispatcher, experts, plans()["top-2"], tokens_TD)[1]
    experts.requires_grad_(False)
    assert torch.equal(gradients(dispatcher, experts, plans()["top-2"], tokens_TD)[1], free)


def test_a_fixed_buffer_is_never_too_small_in_silence() -> None:
    # 48 tokens, all to one of 8 experts; factor 1: 6 places
    plan = top_1_plan(torch.zeros(48, 8))
    with pytest.raises(UserError, match="an expert has 48 tokens and PaddedDispatcher 6 buffer rows"):
        PaddedDispatcher(1.0)(plan, torch.ones(48, 16), MLPExperts(16, 8, 16))
    with pytest.raises(UserError, match="factor is 0"):
        PaddedDispatcher(0.0)
    for capacity in (Capacity(1.25, 1.0), Capacity(1.0, ModalityFactors(image=None, text=1.25))):
        with pytest.raises(
            UserError, match=r"_factor 1\.25: an expert may get more tokens than PaddedDispatcher has buffer rows for"
        ):
            MoEFFN(16, capacity=capacity, dispatcher=PaddedDispatcher(1.2))
        MoEFFN(16, capacity=capacity, dispatcher=PaddedDispatcher(1.25))
    with pytest.raises(
        UserError, match=r"eval_factor is null: in dropless evaluation an expert may get more tokens than"
    ):
        MoEFFN(16, capacity=Capacity(1.25), dispatcher=PaddedDispatcher(1.25))
    MoEFFN(16, capacity=Capacity(1.25), dispatcher=PaddedDispatcher())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fast", FAST, ids=name)
def test_fast_path_equals_loop_on_cuda(fast: Dispatcher) -> None:
    experts = GatedExperts(64, 8, 128).cuda()
    initialise(experts, seed=2, std=0.3)
    inputs = routing_input(256, 64, num_padding=5)
    router = TopKRouter(64, 8, 2)
    initialise(router, seed=1, std=0.5)
    plan = limited(router(inputs), 1.0)
    plan = plan._replace(**{k: v.detach().cuda() for k, v in plan._asdict().items() if isinstance(v, Tensor)})
    results = []
    for dispatcher in (LoopDispatcher(), fast):
        tokens_TD = inputs.tokens_TD.cuda().requires_grad_()
        experts.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out_TD = dispatcher(plan, tokens_TD, experts)
        out_TD.square().sum().backward()
        results.append([out_TD.detach(), tokens_TD.grad, *(parameter.grad for parameter in experts.parameters())])
    for slow, quick in zip(*results, strict=True):
        assert float((quick - slow).abs().max()) <= 0.05 * float(slow.abs().max())
