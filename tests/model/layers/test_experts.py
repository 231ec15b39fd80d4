"""Experts: their initial weights, dropout, and those that every token visits."""

from functools import partial

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.model.dispatch import Capacity, Dispatcher, GroupedDispatcher, LoopDispatcher, SegmentDispatcher
from lightning_moevlm.model.experts import ExpertInit, ExpertStack, GatedExperts, MLPExperts
from lightning_moevlm.model.layers import MoEFFN, initialise

LAYOUT = Layout((Span(Modality.IMAGE, 0, 5),), (torch.arange(5) < 4).expand(3, 5))
DISPATCHERS: list[Dispatcher] = [LoopDispatcher(), SegmentDispatcher(), GroupedDispatcher()]


def started(kind: type[ExpertStack], init: ExpertInit) -> dict[str, torch.Tensor]:
    experts = kind(64, 4, 32, init=init)  # type: ignore[call-arg]
    initialise(experts, seed=0, std=0.02)
    return {name: parameter.detach() for name, parameter in experts.named_parameters()}


@pytest.mark.parametrize("kind", [MLPExperts, GatedExperts])
def test_equal_experts_are_copies_of_the_first_of_the_other_arm(kind: type[ExpertStack]) -> None:
    different, same = started(kind, ExpertInit()), started(kind, ExpertInit(same=True))
    for name, stack in same.items():
        assert torch.equal(stack, different[name][:1].expand_as(stack))
        assert not torch.equal(different[name][0], different[name][1])


@pytest.mark.parametrize("kind", [MLPExperts, GatedExperts])
def test_initial_scale_goes_with_the_inputs_of_each_matrix(kind: type[ExpertStack]) -> None:
    # Switch: std = sqrt(0.1 / 64) = 0.0395 for W_up, sqrt(0.1 / 32) = 0.0559 for W_down; truncation at 2 std makes the
    # deviation 0.88 of it
    stacks = started(kind, ExpertInit(scale=0.1))
    assert float(stacks["up_EDF"].std()) == pytest.approx(0.88 * 0.0395, rel=0.05)
    assert float(stacks["down_EFD"].std()) == pytest.approx(0.88 * 0.0559, rel=0.05)
    assert torch.equal(started(kind, ExpertInit(scale=0.0))["up_EDF"], torch.zeros(4, 64, 32))


def layer(dispatcher: Dispatcher | None = None, dropout: float = 0.0, **options: object) -> MoEFFN:
    experts = partial(MLPExperts, hidden_dim=24, dropout=dropout)
    built = MoEFFN(16, 4, experts=experts, dispatcher=dispatcher, **options)  # type: ignore[arg-type]
    initialise(built, seed=0, std=0.3)
    return built


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda each: type(each).__name__)
def test_expert_dropout_acts_in_training_alone_and_keeps_the_mean(dispatcher: Dispatcher) -> None:
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    plain = layer(dispatcher)(tokens, LAYOUT).tokens_BSD
    dropping = layer(dispatcher, dropout=0.4)
    assert torch.equal(dropping.eval()(tokens, LAYOUT).tokens_BSD, plain)
    dropping.train()
    torch.manual_seed(0)
    many = LAYOUT._replace(valid_BS=LAYOUT.valid_BS.repeat(400, 1))  # tokens do not compete, so 400 runs are one
    runs = dropping(tokens.repeat(400, 1, 1), many).tokens_BSD.detach().unflatten(0, (400, 3))
    assert not torch.equal(runs[0], runs[1])
    # the mean of 400 runs is within 5 standard errors of the plain output, everywhere
    assert bool(((runs.mean(0) - plain).abs() <= 5 * runs.std(0) / 400**0.5 + 1e-6).all())


def test_dropout_gradient_is_that_of_the_units_that_were_kept() -> None:
    # the path with dropout is the product-by-product one; same seed, same mask in forward and backward
    moe = layer(SegmentDispatcher(), dropout=0.5)
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return moe(tokens, LAYOUT).tokens_BSD.sum()

    (gradient,) = torch.autograd.grad(run(tokens), tokens)
    direction = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slope = (run(tokens + 1e-3 * direction) - run(tokens - 1e-3 * direction)) / 2e-3
    assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=0.02, abs=2e-3)


def test_shared_experts_see_every_token_and_no_padding() -> None:
    # places for ceil(1e-6 x 12 / 4) = 1 pair per expert, so 8 of 12 tokens have nothing but the shared experts
    shared = partial(MLPExperts, hidden_dim=8)
    moe = layer(capacity=Capacity(1e-6, 1e-6), shared=shared, num_shared=2)
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    output = moe(tokens, LAYOUT)
    (routed,) = output.plans
    assert torch.equal(output.tokens_BSD[:, 4], torch.zeros(3, 16))
    dropped_T = torch.ones(15, dtype=torch.bool).index_fill(0, routed.plan.token_N[routed.plan.kept_N], False)
    dropped_T &= routed.plan.valid_T
    assert int(dropped_T.sum()) >= 8
    assert moe.shared is not None
    flat_TD = tokens.reshape(15, 16)
    expected_TD = sum(
        moe.shared.run(flat_TD, tuple(stack[expert] for stack in moe.shared.stacks()), torch.matmul)
        for expert in range(2)
    )
    torch.testing.assert_close(output.tokens_BSD.reshape(15, 16)[dropped_T], expected_TD[dropped_T])


def test_shared_experts_count_in_flops() -> None:
    # two shared experts of width 8: 2 x 4 x 16 x 8 = 1024 per token
    more = layer(shared=partial(MLPExperts, hidden_dim=8), num_shared=2).costs({Modality.IMAGE: 10}).experts
    assert more - layer().costs({Modality.IMAGE: 10}).experts == 10 * 1024


def test_routed_experts_start_alike_with_and_without_shared_ones() -> None:
    one, other = layer(), layer(shared=partial(MLPExperts, hidden_dim=8))
    assert torch.equal(one.experts.up_EDF, other.experts.up_EDF)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: MLPExperts(16, 4, dropout=1.0), "expert dropout is 1.0"),
        (lambda: GatedExperts(16, 4, dropout=-0.1), "expert dropout is -0.1"),
        (lambda: ExpertInit(scale=-1.0), "initial scale of experts is -1.0"),
        (lambda: MoEFFN(16, 4, shared=MLPExperts, num_shared=0), "num_shared is 0"),
    ],
)
def test_values_out_of_range_are_refused(build: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        build()  # type: ignore[operator]
