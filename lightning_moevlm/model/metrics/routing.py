"""Routing telemetry of one layer and one modality. Formulas:

load_e          kept pairs of e / kept pairs
load entropy    H(load) / ln E                               1 = even use, 0 = one expert
token entropy   mean over tokens of H(p_x) / ln E            1 = undecided, 0 = certain
max violation   max_e c_e / mean_e c_e - 1, c = chosen pairs before capacity   (arXiv 2408.15664, section 4.1)
drop rate       1 - kept pairs / chosen pairs
dead experts    experts that no token chose
logit max       max |router logit|
capacity        mean over tokens of the capacity factor that holds after rounding
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingPlan


class RoutingMetrics(NamedTuple):
    """Scalars (fp32, 0-d) and the load per expert, all without gradient; entropies are shares of ln E."""

    load_E: Tensor
    load_entropy: Tensor
    token_entropy: Tensor
    max_violation: Tensor
    drop_rate: Tensor
    dead_experts: Tensor
    logit_max: Tensor


@torch.no_grad()
def routing_metrics(plans: Sequence[RoutingPlan], modality: Modality) -> RoutingMetrics:
    """Measure how the valid tokens of one modality were routed by one layer, in all its forward passes together."""
    num_experts = plans[0].num_experts
    tokens = [plan.valid_T & (plan.modality_T == modality) for plan in plans]
    # fp32 from here on: a ratio of two integers would take torch's default dtype, which bf16-true sets to bf16
    chosen_E = _total([plan.chosen_loads(plan.modality_T, len(Modality))[modality] for plan in plans]).float()
    kept_E = _total([plan.kept_loads(plan.modality_T, len(Modality))[modality] for plan in plans]).float()
    num_tokens = _total([token_T.sum() for token_T in tokens]).clamp(min=1)
    entropies = [(entropy(plan.probs_TE) * token_T).sum() for plan, token_T in zip(plans, tokens, strict=True)]
    largest = [_largest(plan.logits_TE, token_T) for plan, token_T in zip(plans, tokens, strict=True)]
    load_E = kept_E / kept_E.sum().clamp(min=1e-20)
    log_experts = max(math.log(num_experts), 1e-12)
    return RoutingMetrics(
        load_E=load_E,
        load_entropy=entropy(load_E) / log_experts,
        token_entropy=_total(entropies) / num_tokens / log_experts,
        max_violation=chosen_E.max() * num_experts / chosen_E.sum().clamp(min=1e-20) - 1,
        drop_rate=1 - kept_E.sum() / chosen_E.sum().clamp(min=1e-20),
        dead_experts=(chosen_E == 0).sum(),
        logit_max=torch.stack(largest).max(),
    )


@torch.no_grad()
def capacity_factor(plans: Sequence[RoutingPlan], modality: Modality) -> float | None:
    """Return the mean capacity factor that holds for the valid tokens of a modality; None where nothing limits them."""
    limits = [
        plan.capacity_T[plan.valid_T & (plan.modality_T == modality)]
        for plan in plans
        if isinstance(plan, PairPlan) and plan.capacity_T is not None
    ]
    factor = float(torch.cat(limits).mean()) if limits else math.inf
    return factor if math.isfinite(factor) else None


def _total(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(dim=0)


def _largest(logits_TE: Tensor, token_T: Tensor) -> Tensor:
    masked_TE = torch.where(token_T.unsqueeze(-1), logits_TE, 0.0).abs()
    return masked_TE.max() if masked_TE.numel() else masked_TE.new_zeros(())


def entropy(probs: Tensor) -> Tensor:
    """Entropy over the last axis in nats, with 0 ln 0 = 0."""
    return torch.special.entr(probs).sum(dim=-1)
