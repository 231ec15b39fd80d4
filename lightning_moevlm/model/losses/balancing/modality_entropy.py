"""Entropy losses per modality: LIMoE (arXiv 2206.02770, section 2.2).

    local_m  = mean over tokens of modality m of H(p_x)              each token should be certain
    global_m = max(0, tau_m - H(mean of p_x over modality m))        each modality should use at least e^tau_m experts
    loss     = sum over m of a_m local_m (or global_m) / number of m that occur

The balance of a pooled batch hides the collapse of its smaller modality; these are computed for each modality apart
and averaged over those that occur. With equal weights and no threshold their sum is minus the mutual information of
tokens and experts, up to the constant tau.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.schedules import Schedule
from lightning_moevlm.contracts.step_records import PlanSize
from lightning_moevlm.model.losses.groups import Grouping
from lightning_moevlm.model.losses.loss_input import LossInput, RoutedLayer
from lightning_moevlm.model.losses.plan_loss import PlanLoss
from lightning_moevlm.model.losses.weights import BalanceWeight

_BY_MODALITY = Grouping(by_modality=True)


@final
@dataclass(frozen=True)
class LocalEntropy(PlanLoss):
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

    @property
    def adds_up(self) -> bool:
        """True: means over tokens."""
        return True

    def sums(self, inputs: LossInput) -> Tensor:
        """Return the entropy of each modality's tokens in nats, (A,)."""
        plan = inputs.plan
        return _BY_MODALITY.sums(entropy(plan.probs_TE).unsqueeze(-1), plan).squeeze(-1)

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return their means, averaged over modalities."""
        return _mean_over_modalities(sums / size.tokens_A.clamp(min=1), size, (self.image, self.text))


@final
@dataclass(frozen=True)
class GlobalEntropy(PlanLoss):
    """Missing entropy of a modality's mean distribution.

    Args:
        weight: of the loss.
        image: factor a of image tokens; null leaves them out.
        text: factor a of text tokens; null leaves them out.
        min_image_experts: e^tau, least number of experts that images should use; null is all of them.
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
        """Refuse a least number above the number of experts.

        Raises:
            UserError: with the number of experts.
        """
        for name in ("min_image_experts", "min_text_experts"):
            if (getattr(self, name) or 1) > layer.num_experts:
                raise UserError(
                    f"global_entropy.{name} is {getattr(self, name)} and a layer has {layer.num_experts} experts: "
                    f"choose at most {layer.num_experts}, or null for all of them"
                )

    def sums(self, inputs: LossInput) -> Tensor:
        """Return the probabilities of each modality's tokens, (A, E)."""
        return _BY_MODALITY.sums(inputs.plan.probs_TE, inputs.plan)

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return the entropy that their means lack, averaged over modalities."""
        wanted = (self.min_image_experts, self.min_text_experts)
        entropy_A = entropy(_BY_MODALITY.means(sums, size))
        missing = [math.log(count or sums.shape[1]) - entropy_A[k] for k, count in enumerate(wanted)]
        return _mean_over_modalities(torch.stack(missing).clamp(min=0), size, (self.image, self.text))


def entropy(probs: Tensor) -> Tensor:
    """Return the entropy over the last axis in nats, with a finite gradient at p = 0."""
    # the floor keeps the gradient of p ln p finite at p = 0
    return -(probs * probs.clamp(min=1e-20).log()).sum(dim=-1)


def _check_factors(loss: str, image: float | None, text: float | None) -> None:
    for name, factor in (("image", image), ("text", text)):
        if factor is not None:
            check_number(f"{loss}.{name}", factor, least=0, advice=", or null to leave those tokens out")


def _mean_over_modalities(value_A: Tensor, size: PlanSize, factors: tuple[float | None, float | None]) -> Tensor:
    """Average over the modalities that have a factor and a valid token, each times its factor; 0 where none has."""
    here_A = (size.tokens_A > 0).to(value_A.dtype)
    asked = [(value_A[k] * here_A[k] * factor, here_A[k]) for k, factor in enumerate(factors) if factor is not None]
    if not asked:
        return value_A.new_zeros(())
    return torch.stack([value for value, _ in asked]).sum() / torch.stack([here for _, here in asked]).sum().clamp(
        min=1
    )
