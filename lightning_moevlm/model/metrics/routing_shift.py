"""Measures how differently two runs of one layer route, such as one in a narrower format. Formulas:

overlap           mean over tokens of |chosen and chosen by the reference| / |chosen by the reference|
flip rate         tokens whose set of chosen experts differs / tokens
logit error max   max |logit - reference|
logit error rms   sqrt(mean (logit - reference)^2), over tokens and experts

A flipped token runs through other experts, so a small error of a logit becomes a large error of the layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality, PairPlan


class RoutingShift(NamedTuple):
    """fp32, 0-d, without gradient; 0 where no token of the modality is valid."""

    flip_rate: Tensor
    logit_error_max: Tensor
    logit_error_rms: Tensor


@torch.no_grad()
def routing_shift(
    plans: Sequence[PairPlan], references: Sequence[PairPlan], modality: Modality | None = None
) -> RoutingShift:
    """Compare the plans of one layer, in all its forward passes together, with those of the same tokens elsewhere.

    modality: whose valid tokens count; None takes all of them. Layers with as many experts may be compared as one.
    """
    num_experts = plans[0].num_experts
    tokens = [plan.valid_T if modality is None else plan.valid_T & (plan.modality_T == modality) for plan in plans]
    flipped_T = [
        (chosen_experts(plan) != chosen_experts(reference)).any(dim=-1)
        for plan, reference in zip(plans, references, strict=True)
    ]
    error_TE = [
        (plan.logits_TE - reference.logits_TE).float() for plan, reference in zip(plans, references, strict=True)
    ]
    token_T = torch.cat(tokens)
    masked_TE = torch.where(token_T.unsqueeze(-1), torch.cat(error_TE), 0.0)
    num_tokens = token_T.sum().clamp(min=1)
    return RoutingShift(
        flip_rate=(torch.cat(flipped_T) & token_T).sum().float() / num_tokens,
        logit_error_max=masked_TE.abs().max() if masked_TE.numel() else masked_TE.new_zeros(()),
        logit_error_rms=(masked_TE.square().sum() / (num_tokens * num_experts)).sqrt(),
    )


def chosen_experts(plan: PairPlan) -> Tensor:
    """Return the router's choices before capacity, bool (T, E)."""
    pair_N = plan.token_N * plan.num_experts + plan.expert_N
    count = torch.bincount(pair_N[plan.chosen_N], minlength=plan.num_tokens * plan.num_experts)
    return count.reshape(plan.num_tokens, plan.num_experts) > 0


def chosen_overlap(chosen_TE: Tensor, reference_TE: Tensor) -> Tensor:
    """Return the share of a reference's choices that are chosen, fp32, 0-d; 1 without tokens.

    With the choices of an earlier step against those of the last one this is router saturation (OLMoE, arXiv
    2409.02060, section 5.1).

    Args:
        chosen_TE: bool.
        reference_TE: bool, at least one expert for each token.
    """
    if not len(chosen_TE):
        return torch.ones(())
    return ((chosen_TE & reference_TE).sum(dim=-1) / reference_TE.sum(dim=-1)).mean()
