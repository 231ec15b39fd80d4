"""Soft slots: the mixes by hand, the slots through every dispatcher, and what padding may not do."""

import math

import pytest
import torch

from lightning_moevlm.contracts.routing_plan import MixPlan, Modality, RoutingInput
from lightning_moevlm.model.dispatch import Dispatcher, GroupedDispatcher, LoopDispatcher, SegmentDispatcher
from lightning_moevlm.model.experts import GatedExperts, MLPExperts
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.losses import LoadBalance, RouterZ
from lightning_moevlm.model.metrics import routing_metrics
from lightning_moevlm.model.routers import Gate, SoftRouter
from tests.routing import loss_of, routing_input

DISPATCHERS = [LoopDispatcher(), SegmentDispatcher(), GroupedDispatcher()]


def soft_router(gate: Gate | None = None) -> SoftRouter:
    router = SoftRouter(16, 4, slots_per_expert=2, gate=gate or Gate())
    initialise(router, seed=0, std=0.5)
    return router


def test_mixes_by_hand() -> None:
    # tokens along the two slots' directions, scale ln 3: scores ln 3 on the own slot, 0 on the other
    router = SoftRouter(2, 2, slots_per_expert=1)
    with torch.no_grad():
        router.slot_EZD.copy_(torch.tensor([[[5.0, 0.0]], [[0.0, 0.2]]]))  # lengths do not matter
        router.scale.fill_(math.log(3))
    tokens_TD = torch.tensor([[7.0, 0.0], [0.0, 1.0]])
    plan = router(RoutingInput(tokens_TD, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), 1))
    share = torch.tensor([[0.75, 0.25], [0.25, 0.75]])  # 3 / (3 + 1)
    torch.testing.assert_close(plan.dispatch_BEZS[0, :, 0], share)
    torch.testing.assert_close(plan.combine_BSEZ[0, :, :, 0], share)
    torch.testing.assert_close(plan.probs_TE, share)
    # identity experts would give combine @ dispatch @ tokens
    torch.testing.assert_close(plan.chosen_loads()[0], torch.tensor([1.0, 1.0]))


def test_shares_sum_to_one_and_padding_has_none() -> None:
    router = soft_router()
    plan = router(routing_input(40, 16, num_padding=7))
    dispatch_BEZ = plan.dispatch_BEZS.sum(dim=-1)
    torch.testing.assert_close(dispatch_BEZ, torch.ones(4, 4, 2))
    combine_T = plan.combine_BSEZ.sum(dim=(2, 3)).reshape(-1)
    torch.testing.assert_close(combine_T, plan.valid_T.float())
    assert float(plan.dispatch_BEZS.permute(0, 3, 1, 2).reshape(40, 4, 2)[33:].detach().abs().max()) == 0.0
    torch.testing.assert_close(plan.probs_TE.sum(dim=-1), torch.ones(40))


def test_a_sequence_of_padding_alone_gives_zeros() -> None:
    router, experts = soft_router(), MLPExperts(16, 4, 32)
    initialise(experts, seed=1, std=0.3)
    inputs = routing_input(40, 16, num_padding=15)  # the last of four sequences of ten, and half of the third
    out_TD = SegmentDispatcher()(router(inputs), inputs.tokens_TD, experts)
    assert torch.equal(out_TD[25:], torch.zeros(15, 16)) and bool(out_TD.isfinite().all())
    out_TD.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in router.parameters() if p.grad is not None)


def test_sequences_do_not_mix_and_padding_content_changes_nothing() -> None:
    router = soft_router().eval()
    experts = MLPExperts(16, 4, 32)
    initialise(experts, seed=1, std=0.3)
    inputs = routing_input(40, 16, num_padding=7)
    changed_TD = inputs.tokens_TD.clone()
    changed_TD[:10] = 1.0  # the first sequence
    changed_TD[33:] = -3.0  # padding of the last one
    out_TD, other_TD = (
        SegmentDispatcher()(router(inputs._replace(tokens_TD=tokens)), tokens, experts)
        for tokens in (inputs.tokens_TD, changed_TD)
    )
    torch.testing.assert_close(out_TD[10:], other_TD[10:])
    assert not torch.allclose(out_TD[:10], other_TD[:10])


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("stack", [MLPExperts, GatedExperts])
def test_every_dispatcher_runs_slots(dispatcher: Dispatcher, stack: type[MLPExperts] | type[GatedExperts]) -> None:
    router, experts = soft_router(), stack(16, 4, 32)
    initialise(experts, seed=1, std=0.3)
    inputs = routing_input(40, 16, num_padding=7)
    plan = router(inputs)
    # expert by expert, in the words of the paper
    tokens_BSD = inputs.tokens_TD.reshape(4, 10, 16)
    expected_BSD = torch.zeros(4, 10, 16)
    for expert in range(4):
        slots_BZD = plan.dispatch_BEZS[:, expert] @ tokens_BSD
        out_BZD = experts.run(slots_BZD, tuple(weights[expert] for weights in experts.stacks()), torch.matmul)
        expected_BSD = expected_BSD + plan.combine_BSEZ[:, :, expert] @ out_BZD
    actual_TD = dispatcher(plan, inputs.tokens_TD, experts)
    torch.testing.assert_close(actual_TD, expected_BSD.reshape(40, 16))
    actual_TD.square().sum().backward()
    for parameter in (*router.parameters(), *experts.parameters()):
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0


def test_losses_and_metrics_read_slots() -> None:
    plan = soft_router()(routing_input(40, 16, num_padding=7))
    assert isinstance(plan, MixPlan)
    assert bool(loss_of(LoadBalance(), plan).isfinite()) and bool(loss_of(RouterZ(), plan).isfinite())
    metrics = routing_metrics([plan, plan], Modality.TEXT)
    assert float(metrics.load_E.sum()) == pytest.approx(1.0)
    assert float(metrics.drop_rate) == 0.0 and int(metrics.dead_experts) == 0


def test_the_load_of_slots_carries_no_gradient() -> None:
    # E * sum of f P: through P alone the gradient on a probability is E f / T; through f as well, twice that
    plan = soft_router()(routing_input(8, 16))
    probs_TE = plan.probs_TE.detach().requires_grad_()
    loss_of(LoadBalance(), plan._replace(probs_TE=probs_TE)).backward()
    torch.testing.assert_close(probs_TE.grad, 4 * probs_TE.detach().mean(dim=0, keepdim=True).expand(8, 4) / 8)


def test_cost_is_set_by_slots() -> None:
    router = SoftRouter(16, 4, slots_per_expert=3)
    assert router.expert_rows(10) == router.expert_rows(1000) == 12
    assert router.experts_per_token == 4


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens: int) -> None:
    plan = soft_router()(routing_input(num_tokens, 16))
    assert plan.num_tokens == num_tokens and plan.num_experts == 4


def test_switches_of_the_gate_act() -> None:
    inputs = routing_input(40, 16)
    plain = soft_router().eval()(inputs).logits_TE
    assert not torch.equal(soft_router(gate=Gate(temperature=2.0)).eval()(inputs).logits_TE, plain)
    jittered = soft_router(gate=Gate(jitter=0.1))
    assert not torch.equal(jittered.train()(inputs).logits_TE, plain)
    assert torch.equal(jittered.eval()(inputs).logits_TE, plain)
