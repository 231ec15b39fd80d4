"""The same weights in Hugging Face transformers' MoE blocks: the same numbers out. Extra `peers`; skipped if absent."""

import pytest
import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.dispatch import Dispatcher, GroupedDispatcher, LoopDispatcher, SegmentDispatcher
from lightning_moevlm.model.experts import GatedExperts
from lightning_moevlm.model.losses import LoadBalance
from lightning_moevlm.model.routers import TopKRouter
from tests.routing import loss_of

pytest.importorskip("transformers", reason="compares with transformers: pip install 'lightning-moevlm[peers]'")

from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

DIM, HIDDEN, EXPERTS, TOP_K = 16, 24, 8, 2

# name -> (block, whether the chosen weights are divided by their sum)
BLOCKS = {
    "Mixtral": (
        lambda: MixtralSparseMoeBlock(
            MixtralConfig(
                hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
            )
        ),
        True,
    ),
    "OLMoE": (
        lambda: OlmoeSparseMoeBlock(
            OlmoeConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
        ),
        False,
    ),
    "Qwen3": (
        lambda: Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(
                hidden_size=DIM, moe_intermediate_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
                norm_topk_prob=True,
            )
        ),
        True,
    ),
}  # fmt: skip


def tokens(num_tokens: int = 48) -> Tensor:
    return torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(0))


def routing_input(tokens_TD: Tensor) -> RoutingInput:
    num_tokens = tokens_TD.shape[0]
    return RoutingInput(tokens_TD, torch.zeros(num_tokens, dtype=torch.int64), torch.ones(num_tokens, dtype=torch.bool))


def copy_of(block: torch.nn.Module, *, renormalise: bool) -> tuple[TopKRouter, GatedExperts]:
    """Our parts with the block's weights, which it keeps as (out, in) with gate and up in one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    router = TopKRouter(DIM, EXPERTS, top_k=TOP_K, renormalise=renormalise)
    experts = GatedExperts(DIM, EXPERTS, HIDDEN)
    with torch.no_grad():
        router.weight_ED.copy_(block.gate.weight)
        gate_EFD, up_EFD = block.experts.gate_up_proj.chunk(2, dim=1)
        experts.gate_EDF.copy_(gate_EFD.transpose(1, 2))
        experts.up_EDF.copy_(up_EFD.transpose(1, 2))
        experts.down_EFD.copy_(block.experts.down_proj.transpose(1, 2))
    return router, experts


@pytest.mark.parametrize(
    "dispatcher", [LoopDispatcher(), SegmentDispatcher(), GroupedDispatcher()], ids=lambda d: type(d).__name__
)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, dispatcher: Dispatcher) -> None:
    build, renormalise = BLOCKS[name]
    block = build()
    router, experts = copy_of(block, renormalise=renormalise)
    theirs_TD, ours_TD = tokens().requires_grad_(), tokens().requires_grad_()
    their_out_TD = block(theirs_TD.unsqueeze(0)).squeeze(0)
    our_out_TD = dispatcher(router(routing_input(ours_TD)), ours_TD, experts)
    torch.testing.assert_close(our_out_TD, their_out_TD, rtol=1e-5, atol=1e-5)

    slope = torch.linspace(-1, 1, DIM)
    (their_out_TD * slope).sum().backward()
    (our_out_TD * slope).sum().backward()
    gate_EDF, up_EDF = block.experts.gate_up_proj.grad.transpose(1, 2).chunk(2, dim=2)
    for ours, theirs in (
        (ours_TD.grad, theirs_TD.grad),
        (router.weight_ED.grad, block.gate.weight.grad),
        (experts.gate_EDF.grad, gate_EDF),
        (experts.up_EDF.grad, up_EDF),
        (experts.down_EFD.grad, block.experts.down_proj.grad.transpose(1, 2)),
    ):
        assert float(theirs.abs().max()) > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 9])
def test_load_balancing_loss(padding: int) -> None:
    # theirs counts the k choices of a token as k, so that balance has the value k; ours counts shares of pairs: 1
    router = TopKRouter(DIM, EXPERTS, top_k=TOP_K)
    with torch.no_grad():
        router.weight_ED.copy_(torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(2)))
    valid_T = torch.arange(48) < 48 - padding
    plan = router(routing_input(tokens())._replace(valid_T=valid_T))
    assert isinstance(plan, PairPlan)
    theirs = load_balancing_loss_func((plan.logits_TE,), EXPERTS, TOP_K, valid_T.unsqueeze(0) if padding else None)
    torch.testing.assert_close(loss_of(LoadBalance(), plan) * TOP_K, theirs, rtol=1e-5, atol=1e-6)
