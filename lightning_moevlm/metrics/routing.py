"""Routing telemetry of one plan and one modality. Formulas:

load_e          kept pairs of e / kept pairs
load entropy    H(load) / ln E                               1 = even use, 0 = one expert
token entropy   mean over tokens of H(p_x) / ln E            1 = undecided, 0 = certain
max violation   max_e c_e / mean_e c_e - 1, c = chosen pairs before capacity   (arXiv 2408.15664, section 4.1)
drop rate       1 - kept pairs / chosen pairs
dead experts    experts that nobody chose
logit max       max |router logit|
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.plans import Modality, PairPlan


class RoutingMetrics(NamedTuple):
    """Scalars (fp32, 0-d) and the load per expert, all without gradient; entropies are shares of ln E."""

    load_E: Tensor
    load_entropy: Tensor
    token_entropy: Tensor
    max_violation: Tensor
    drop_rate: Tensor
    dead_experts: Tensor
    logit_max: Tensor


def join_plans(plans: Sequence[PairPlan]) -> PairPlan:
    """Join plans of one layer from several forward passes into one, token numbers shifted."""
    first_token = 0
    shifted = []
    for plan in plans:
        shifted.append(plan._replace(token_N=plan.token_N + first_token))
        first_token += plan.num_tokens
    return PairPlan(*(torch.cat(fields) for fields in zip(*shifted, strict=True)))


@torch.no_grad()
def routing_metrics(plan: PairPlan, modality: Modality) -> RoutingMetrics:
    """Measure how the valid tokens of one modality were routed."""
    token_T = plan.valid_T & (plan.modality_T == modality)
    here_N = token_T[plan.token_N]
    chosen_E = torch.bincount(plan.expert_N[here_N & plan.chosen_N], minlength=plan.num_experts)
    kept_E = torch.bincount(plan.expert_N[here_N & plan.kept_N], minlength=plan.num_experts)
    load_E = kept_E / kept_E.sum().clamp(min=1)
    log_experts = max(math.log(plan.num_experts), 1e-12)
    probs_TE = plan.probs_TE[token_T]
    num_tokens = max(probs_TE.shape[0], 1)
    return RoutingMetrics(
        load_E=load_E,
        load_entropy=entropy(load_E) / log_experts,
        token_entropy=entropy(probs_TE).sum() / num_tokens / log_experts,
        max_violation=chosen_E.max() * plan.num_experts / chosen_E.sum().clamp(min=1) - 1,
        drop_rate=1 - kept_E.sum() / chosen_E.sum().clamp(min=1),
        dead_experts=(chosen_E == 0).sum(),
        logit_max=torch.where(token_T.unsqueeze(-1), plan.logits_TE, 0.0).abs().max(),
    )


def entropy(probs: Tensor) -> Tensor:
    """Entropy over the last axis in nats, with 0 ln 0 = 0."""
    return torch.special.entr(probs).sum(dim=-1)
