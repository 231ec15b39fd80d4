"""ZClip: clip the gradient if its norm is an outlier of its own recent past (arXiv 2504.02507).

    z = (norm - mean) / std                 of the norms so far, exponential averages
    z > threshold:  clip to mean + threshold^2 / z std    the further out, the closer to the mean
    mean <- alpha mean + (1 - alpha) norm'  with norm' the norm after clipping, so that a spike hardly counts
    var  <- alpha var + (1 - alpha) (norm' - mean)^2

The first steps are only measured: their mean and variance start the averages. A norm that is not finite is left out.
The order of the two averages (the variance with the new mean) is that of the authors' code.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.number_checks import check_number

_SMALLEST_STD = 1e-6


class NormStatistics(NamedTuple):
    """State of ZClip: fp32 scalars."""

    mean: Tensor
    variance: Tensor
    num_steps: Tensor
    """Norms seen, int64."""

    @classmethod
    def empty(cls, device: torch.device) -> "NormStatistics":
        """Return the statistics of no step."""
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return cls(zero, zero, torch.zeros((), dtype=torch.int64, device=device))


@dataclass(frozen=True)
class ZClip:
    """Clips the gradient if its norm is an outlier of its own past.

    Args:
        z: standard deviations above the mean from which norms are clipped.
        alpha: share of the averages that remains after a step.
        warmup_steps: optimiser steps that are only measured, 2 or more.

    Raises:
        UserError: a value outside its range.
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup_steps: int = 25

    def __post_init__(self) -> None:
        check_number("z_clip.z", self.z, above=0, advice="; the paper's is 2.5")
        check_number("z_clip.alpha", self.alpha, above=0, below=1, advice="; the paper's is 0.97")
        check_number("z_clip.warmup_steps", self.warmup_steps, least=2, advice=": a variance needs as many")

    def __call__(self, norm: Tensor, seen: NormStatistics) -> tuple[Tensor, NormStatistics]:
        """Return the factor of gradients of this norm (fp32 scalar), and the statistics after this step."""
        std = seen.variance.sqrt()
        z = (norm - seen.mean) / (std + _SMALLEST_STD)
        is_finite = norm.isfinite()
        is_ready = seen.num_steps >= self.warmup_steps
        is_outlier = is_ready & is_finite & (z > self.z)
        clipped = torch.where(is_outlier, seen.mean + self.z**2 / z * std, norm)
        coefficient = torch.where(is_outlier, clipped / norm, torch.ones_like(norm))
        # while warming up: running mean and (population) variance of the norms seen so far
        keep = torch.where(is_ready, torch.full_like(norm, self.alpha), seen.num_steps / (seen.num_steps + 1))
        mean = keep * seen.mean + (1 - keep) * clipped
        distance = torch.where(is_ready, (clipped - mean).square(), (clipped - mean) * (clipped - seen.mean))
        variance = keep * seen.variance + (1 - keep) * distance
        return coefficient, NormStatistics(
            torch.where(is_finite, mean, seen.mean),
            torch.where(is_finite, variance, seen.variance),
            seen.num_steps + is_finite,
        )
