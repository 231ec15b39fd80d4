"""Entropy losses per modality: LIMoE (arXiv 2206.02770, section 2.2).

    local_m  = mean over tokens of modality m of H(p_x)              each token should be sure
    global_m = max(0, tau - H(mean of p_x over modality m))          each modality should use at least e^tau experts

The balance of a pooled batch hides the collapse of its smaller modality; these are computed for each modality apart
and averaged over those that occur. With equal weights and no threshold their sum is minus the mutual information of
tokens and experts, up to the constant tau.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_moevlm.plans import Modality, RoutingPlan

Modalities = tuple[Literal["image", "text"], ...]
Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LocalEntropy:
    """Mean entropy of single tokens.

    Args:
        weight: LIMoE wants it for text and not for images.
        modalities: to which it applies.
    """

    weight: float = 1e-2
    modalities: Modalities = ("text",)

    def __call__(self, plan: RoutingPlan) -> Tensor:
        """Return the raw loss of one plan in nats, a scalar fp32 tensor."""
        return _mean_over_modalities(plan, self.modalities, local_entropy)


@dataclass(frozen=True)
class GlobalEntropy:
    """Missing entropy of a modality's mean distribution.

    Args:
        weight: of the loss.
        modalities: to which it applies.
        min_experts: e^tau, the number of experts that a modality should use; null asks for all of them.
    """

    weight: float = 1e-2
    modalities: Modalities = ("image", "text")
    min_experts: float | None = None

    def __call__(self, plan: RoutingPlan) -> Tensor:
        """Return the raw loss of one plan in nats, a scalar fp32 tensor."""
        threshold = math.log(self.min_experts or plan.num_experts)

        def missing(probs_TE: Tensor, token_T: Tensor) -> Tensor:
            return (threshold - global_entropy(probs_TE, token_T)).clamp(min=0)

        return _mean_over_modalities(plan, self.modalities, missing)


def local_entropy(probs_TE: Tensor, token_T: Tensor) -> Tensor:
    """Return the mean entropy of the selected tokens in nats; 0 where there is none."""
    return (_entropy(probs_TE) * token_T).sum() / token_T.sum().clamp(min=1)


def global_entropy(probs_TE: Tensor, token_T: Tensor) -> Tensor:
    """Return the entropy of the selected tokens' mean distribution in nats; 0 where there is none."""
    return _entropy((probs_TE * token_T.unsqueeze(-1)).sum(dim=0) / token_T.sum().clamp(min=1))


def _entropy(probs: Tensor) -> Tensor:
    # the floor keeps the gradient of p ln p finite at p = 0
    return -(probs * probs.clamp(min=1e-20).log()).sum(dim=-1)


def _mean_over_modalities(plan: RoutingPlan, labels: Modalities, measure: Measure) -> Tensor:
    """Average over the modalities that occur among the plan's valid tokens."""
    values, present = [], []
    for modality in Modality:
        if modality.label in labels:
            token_T = plan.valid_T & (plan.modality_T == modality)
            present.append(token_T.any())
            values.append(measure(plan.probs_TE, token_T))
    if not values:
        return plan.probs_TE.new_zeros(())
    here = torch.stack(present).to(plan.probs_TE.dtype)
    return (torch.stack(values) * here).sum() / here.sum().clamp(min=1)
