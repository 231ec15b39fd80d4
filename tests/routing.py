"""Small routing inputs and plans, written out by hand where a test does arithmetic."""

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput, RoutingPlan
from lightning_moevlm.model.dispatch import Capacity, apply_capacity
from lightning_moevlm.model.dispatch.capacity import Priority
from lightning_moevlm.model.losses import LossInput, PlanLoss
from lightning_moevlm.model.routers.choices import make_plan

NOTHING = torch.zeros(0, dtype=torch.int64)
"""The tally of a router that needs none."""


def routing_input(num_tokens: int, dim: int, *, num_padding: int = 0, seed: int = 0) -> RoutingInput:
    """Random tokens; the last `num_padding` are padding, filled with huge values that must not matter."""
    generator = torch.Generator().manual_seed(seed)
    tokens_TD = torch.randn(num_tokens, dim, generator=generator)
    valid_T = torch.arange(num_tokens) < num_tokens - num_padding
    tokens_TD[~valid_T] = 1e4
    modality_T = torch.where(torch.arange(num_tokens) % 2 == 0, int(Modality.IMAGE), int(Modality.TEXT))
    num_sequences = 4 if num_tokens and num_tokens % 4 == 0 else 1
    return RoutingInput(tokens_TD, modality_T, valid_T, num_sequences, torch.arange(num_tokens) * 7 % 50)


def top_1_plan(logits_TE: Tensor, *, valid_T: Tensor | None = None, modality: Modality = Modality.IMAGE) -> PairPlan:
    """The plan of a top-1 softmax router with these logits."""
    num_tokens = logits_TE.shape[0]
    probs_TE = logits_TE.softmax(dim=-1)
    weight_T, expert_T = probs_TE.max(dim=-1)
    valid = torch.ones(num_tokens, dtype=torch.bool) if valid_T is None else valid_T
    return PairPlan(
        token_N=torch.arange(num_tokens),
        expert_N=expert_T,
        weight_N=weight_T,
        chosen_N=valid,
        kept_N=valid,
        logits_TE=logits_TE,
        probs_TE=probs_TE,
        modality_T=torch.full((num_tokens,), int(modality)),
        valid_T=valid,
    )


def limited(plan: PairPlan, factor: float, priority: Priority = "position") -> PairPlan:
    """The plan under a capacity with this factor in training."""
    return apply_capacity(plan, Capacity(train_factor=factor, priority=priority), training=True)


def full_plan(logits_TE: Tensor, *, valid_T: Tensor | None = None, noise: float = 0.5, top_k: int = 1) -> PairPlan:
    """A plan that every loss can read: sequences of 4 if T allows, modalities in turn, fixed noise of std 1/E."""
    num_tokens, num_experts = logits_TE.shape
    token_T = torch.arange(num_tokens)
    valid = torch.ones(num_tokens, dtype=torch.bool) if valid_T is None else valid_T
    draw = torch.randn(num_tokens, num_experts, dtype=logits_TE.dtype, generator=torch.Generator().manual_seed(7))
    inputs = RoutingInput(logits_TE, token_T % 2, valid, max(1, num_tokens // 4) if num_tokens % 4 == 0 else 1)
    probs_TE = logits_TE.softmax(dim=-1)
    weight_TK, expert_TK = probs_TE.topk(top_k, dim=-1)
    std_TE = torch.full_like(logits_TE, 1 / num_experts)
    noisy_TE = logits_TE + noise * draw * std_TE
    return make_plan(inputs, logits_TE, probs_TE, expert_TK, weight_TK, noise_std_TE=std_TE, noisy_logits_TE=noisy_TE)


def relu_plan(logits_TE: Tensor, *, valid_T: Tensor | None = None) -> PairPlan:
    """The plan of a ReLU router with these logits."""
    num_tokens, num_experts = logits_TE.shape
    valid = torch.ones(num_tokens, dtype=torch.bool) if valid_T is None else valid_T
    inputs = RoutingInput(logits_TE, torch.zeros(num_tokens, dtype=torch.int64), valid)
    weight_TE = logits_TE.relu()
    expert_TE = torch.arange(num_experts).expand(num_tokens, num_experts)
    return make_plan(inputs, logits_TE, logits_TE.softmax(-1), expert_TE, weight_TE, chosen_TK=weight_TE > 0)


def loss_of(loss: PlanLoss, plan: RoutingPlan) -> Tensor:
    """Return the raw loss of one plan of a training step."""
    value = loss(LossInput(plan))
    assert value is not None
    return value
