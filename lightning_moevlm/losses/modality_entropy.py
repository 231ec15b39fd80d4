"""Entropy losses per modality: LIMoE (arXiv 2206.02770, section 2.2).

    local_m  = mean over tokens of modality m of H(p_x)              each token should be sure
    global_m = max(0, tau_m - H(mean of p_x over modality m))        each modality should use at least e^tau_m experts
    loss     = sum over m of a_m local_m (or global_m) / number of m that occur

The balance of a pooled batch hides the collapse of its smaller modality; these are computed for each modality apart
and averaged over those that occur. With equal weights and no threshold their sum is minus the mutual information of
tokens and experts, up to the constant tau.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moevlm.errors import UserError
from lightning_moevlm.losses.loss_input import LossInput, RoutedLayer
from lightning_moevlm.losses.weights import BalanceWeight
from lightning_moevlm.plans import Modality, RoutingPlan
from lightning_moevlm.ranges import check_number
from lightning_moevlm.schedules import Schedule


@dataclass(frozen=True)
class LocalEntropy:
    """Mean entropy of single tokens.

    Args:
        weight: of the loss.
        image: factor a of image tokens; null leaves them out, as LIMoE does.
        text: factor a of text tokens; null leaves them out.

    Raises:
        UserError: a negative factor.
    """

    weight: Schedule = 1e-2
    image: float | None = None
    text: float | None = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_factors("local_entropy", self.image, self.text)

    def __call__(self, inputs: LossInput) -> Tensor:
        """Return the raw loss of one plan in nats, a scalar fp32 tensor."""
        plan = inputs.plan
        factors = {Modality.IMAGE: self.image, Modality.TEXT: self.text}
        entropies = {
            modality: local_entropy(plan.probs_TE, _tokens(plan, modality))
            for modality, factor in factors.items()
            if factor is not None
        }
        return _mean_over_modalities(plan, entropies, factors)


@dataclass(frozen=True)
class GlobalEntropy:
    """Missing entropy of a modality's mean distribution.

    Args:
        weight: of the loss.
        image: factor a of image tokens; null leaves them out.
        text: factor a of text tokens; null leaves them out.
        min_image_experts: e^tau, the number of experts that images should use at least; null asks for all of them.
        min_text_experts: the same for text.

    Raises:
        UserError: a negative factor, or fewer than one expert.
    """

    weight: BalanceWeight = 1e-2
    image: float | None = 1.0
    text: float | None = 1.0
    min_image_experts: float | None = None
    min_text_experts: float | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_factors("global_entropy", self.image, self.text)
        for name in ("min_image_experts", "min_text_experts"):
            count = getattr(self, name)
            if count is not None:
                check_number(f"global_entropy.{name}", count, least=1, advice=" experts, or null for all of them")

    def check(self, layer: RoutedLayer) -> None:
        """Refuse to ask for more experts than there are.

        Raises:
            UserError: with how many there are.
        """
        for name in ("min_image_experts", "min_text_experts"):
            if (getattr(self, name) or 1) > layer.num_experts:
                raise UserError(
                    f"global_entropy.{name} is {getattr(self, name)} and a layer has {layer.num_experts} experts: "
                    f"choose at most {layer.num_experts}, or null for all of them"
                )

    def __call__(self, inputs: LossInput) -> Tensor:
        """Return the raw loss of one plan in nats, a scalar fp32 tensor."""
        plan = inputs.plan
        factors = {Modality.IMAGE: self.image, Modality.TEXT: self.text}
        wanted = {Modality.IMAGE: self.min_image_experts, Modality.TEXT: self.min_text_experts}
        missing: dict[Modality, Tensor] = {}
        for modality, factor in factors.items():
            if factor is not None:
                threshold = math.log(wanted[modality] or plan.num_experts)
                missing[modality] = (threshold - global_entropy(plan.probs_TE, _tokens(plan, modality))).clamp(min=0)
        return _mean_over_modalities(plan, missing, factors)


def local_entropy(probs_TE: Tensor, token_T: Tensor) -> Tensor:
    """Return the mean entropy of the selected tokens in nats; 0 where there is none."""
    return (entropy(probs_TE) * token_T).sum() / token_T.sum().clamp(min=1)


def global_entropy(probs_TE: Tensor, token_T: Tensor) -> Tensor:
    """Return the entropy of the selected tokens' mean distribution in nats; 0 where there is none."""
    return entropy((probs_TE * token_T.unsqueeze(-1)).sum(dim=0) / token_T.sum().clamp(min=1))


def entropy(probs: Tensor) -> Tensor:
    """Return the entropy over the last axis in nats, with a finite gradient at p = 0."""
    # the floor keeps the gradient of p ln p finite at p = 0
    return -(probs * probs.clamp(min=1e-20).log()).sum(dim=-1)


def _check_factors(loss: str, image: float | None, text: float | None) -> None:
    for name, factor in (("image", image), ("text", text)):
        if factor is not None:
            check_number(f"{loss}.{name}", factor, least=0, advice=", or null to leave those tokens out")


def _tokens(plan: RoutingPlan, modality: Modality) -> Tensor:
    return plan.valid_T & (plan.modality_T == modality)


def _mean_over_modalities(
    plan: RoutingPlan, values: dict[Modality, Tensor], factors: dict[Modality, float | None]
) -> Tensor:
    """Average over the modalities that occur among the plan's valid tokens, each times its factor."""
    if not values:
        return plan.probs_TE.new_zeros(())
    here = torch.stack([_tokens(plan, modality).any() for modality in values]).to(plan.probs_TE.dtype)
    weighted = torch.stack([value * (factors[modality] or 0.0) for modality, value in values.items()])
    return (weighted * here).sum() / here.sum().clamp(min=1)
