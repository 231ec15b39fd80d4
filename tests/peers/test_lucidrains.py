"""The same weights in st-moe-pytorch and soft-moe-pytorch: the same numbers out. Extra `peers`; skipped if absent."""

import pytest
import torch
from torch import Tensor, nn

from lightning_moevlm.contracts.routing_plan import RoutingInput
from lightning_moevlm.model.dispatch import LoopDispatcher, SegmentDispatcher
from lightning_moevlm.model.experts import MLPExperts
from lightning_moevlm.model.losses import RouterZ
from lightning_moevlm.model.routers import GShardRouter, SoftRouter
from tests.routing import loss_of

DIM, HIDDEN, EXPERTS, BATCH, LENGTH = 16, 32, 4, 3, 10


def grid() -> Tensor:
    return torch.randn(BATCH, LENGTH, DIM, generator=torch.Generator().manual_seed(0))


def routing_input(tokens_BSD: Tensor) -> RoutingInput:
    tokens_TD = tokens_BSD.flatten(0, 1)
    num_tokens = tokens_TD.shape[0]
    modality_T = torch.zeros(num_tokens, dtype=torch.int64)
    return RoutingInput(tokens_TD, modality_T, torch.ones(num_tokens, dtype=torch.bool), tokens_BSD.shape[0])


def expert(stack: MLPExperts, index: int) -> nn.Module:
    """One expert of our stack as their module."""
    up, down = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(HIDDEN, DIM, bias=False)
    with torch.no_grad():
        up.weight.copy_(stack.up_EDF[index].t())
        down.weight.copy_(stack.down_EFD[index].t())
    return nn.Sequential(up, nn.GELU(), down)


def stack_of_experts() -> MLPExperts:
    stack = MLPExperts(DIM, EXPERTS, HIDDEN)
    with torch.no_grad():
        for index, parameter in enumerate(stack.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
    return stack


def test_st_moe() -> None:
    st_moe = pytest.importorskip("st_moe_pytorch", reason="pip install 'lightning-moevlm[peers]'")
    stack = stack_of_experts()
    # a threshold so small that the second expert always runs, and places for every choice
    theirs = st_moe.MoE(
        dim=DIM, num_experts=EXPERTS, experts=nn.ModuleList(expert(stack, index) for index in range(EXPERTS)),
        threshold_train=1e-9, capacity_factor_train=float(EXPERTS), straight_through_dispatch_tensor=False,
    )  # fmt: skip
    router = GShardRouter(DIM, EXPERTS, threshold=1e-9)
    with torch.no_grad():
        router.weight_ED.copy_(theirs.gate.to_gates.weight)
    tokens_BSD = grid()
    output = theirs(tokens_BSD)
    plan = router(routing_input(tokens_BSD))
    out_TD = SegmentDispatcher()(plan, tokens_BSD.flatten(0, 1), stack)
    torch.testing.assert_close(out_TD, output.outputs.flatten(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss_of(RouterZ(), plan), output.router_z_loss, rtol=1e-5, atol=1e-6)

    slope = torch.linspace(-1, 1, DIM)
    (output.outputs * slope).sum().backward()
    (out_TD * slope).sum().backward()
    torch.testing.assert_close(router.weight_ED.grad, theirs.gate.to_gates.weight.grad, rtol=1e-5, atol=1e-5)
    assert stack.up_EDF.grad is not None
    their_up_EDF = torch.stack([each[0].weight.grad.t() for each in theirs.experts.experts])
    torch.testing.assert_close(stack.up_EDF.grad, their_up_EDF, rtol=1e-5, atol=1e-5)


def test_soft_moe() -> None:
    soft_moe = pytest.importorskip("soft_moe_pytorch", reason="pip install 'lightning-moevlm[peers]'")
    theirs = soft_moe.SoftMoE(dim=DIM, num_experts=EXPERTS, num_slots=2, expert_mult=HIDDEN // DIM)
    stack = stack_of_experts()
    with torch.no_grad():
        for index, each in enumerate(theirs.experts.experts):
            each[0].weight.copy_(stack.up_EDF[index].t())
            each[3].weight.copy_(stack.down_EFD[index].t())
            each[0].bias.zero_()
            each[3].bias.zero_()
    router = SoftRouter(DIM, EXPERTS, slots_per_expert=2)
    with torch.no_grad():
        router.slot_EZD.copy_(theirs.slot_embeds)
        router.scale.fill_(DIM)  # theirs scales tokens and slots by sqrt(D) each
    tokens_BSD = grid()
    mask_BS = torch.arange(LENGTH).expand(BATCH, LENGTH) < torch.tensor([[10], [7], [4]])
    expected_BSD = theirs(tokens_BSD, mask=mask_BS)
    normed_BSD = theirs.norm(tokens_BSD)  # theirs also mixes the normalised tokens; a block of ours has its norm before
    plan = router(routing_input(normed_BSD)._replace(valid_T=mask_BS.flatten()))
    for dispatcher in (LoopDispatcher(), SegmentDispatcher()):
        out_BSD = dispatcher(plan, normed_BSD.flatten(0, 1), stack).view_as(tokens_BSD)
        torch.testing.assert_close(out_BSD[mask_BS], expected_BSD[mask_BS], rtol=1e-5, atol=1e-5)
