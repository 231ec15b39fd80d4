"""Skip-step: a step whose loss or gradient norm is an outlier is not taken (OLMo-core's skip-step optimisers).

    skip if value > mean + sigma std of the last finite values, or value is not finite

for value = task loss and value = gradient norm before clipping. A skipped step changes no parameter, optimiser state or
other state: norms of clipping, balancing biases, adaptive weights, counts of idle experts. A finite outlier still
enters the window, so training that has settled on a new level is not skipped for ever. The schedule and the step count
advance. The decision is a tensor on the device, so the host need not wait.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.number_checks import check_number


class SpikeWindow(NamedTuple):
    """The last values, newest last, fp32; NaN before the first ones."""

    loss_J: Tensor
    norm_J: Tensor
    num_skipped: Tensor
    """Steps skipped since the start of training, int64."""

    @classmethod
    def empty(cls, num_steps: int, device: torch.device) -> "SpikeWindow":
        """Return the window of no step."""
        nothing_J = torch.full((num_steps,), torch.nan, dtype=torch.float32, device=device)
        return cls(nothing_J, nothing_J, torch.zeros((), dtype=torch.int64, device=device))

    def resize(self, num_steps: int) -> "SpikeWindow":
        """Return the same values in a window of another length: the oldest are dropped, or NaN is put before them."""
        missing = self.loss_J.new_full((max(0, num_steps - len(self.loss_J)),), torch.nan)
        loss_J, norm_J = (torch.cat([missing, values])[-num_steps:] for values in (self.loss_J, self.norm_J))
        return SpikeWindow(loss_J, norm_J, self.num_skipped)


@dataclass(frozen=True)
class SkipSpikes:
    """Skips steps whose loss or gradient norm is an outlier or not finite.

    Args:
        sigma: standard deviations above the mean that make a spike; OLMo-core uses 6.
        window: optimiser steps in the statistics. Until half of them are seen, only values that are not finite are
            skipped.

    Raises:
        UserError: a value outside its range.
    """

    sigma: float = 6.0
    window: int = 128

    def __post_init__(self) -> None:
        check_number("skip_spikes.sigma", self.sigma, above=0, advice="; 6 is customary")
        check_number("skip_spikes.window", self.window, least=4, advice=": statistics need as many steps")

    def __call__(self, loss: Tensor, norm: Tensor, seen: SpikeWindow) -> tuple[Tensor, SpikeWindow]:
        """Return whether to skip a step (bool scalar) of this loss and norm (fp32 scalars), and the window after it."""
        skip = self._is_spike(loss, seen.loss_J) | self._is_spike(norm, seen.norm_J)
        return skip, SpikeWindow(_push(seen.loss_J, loss), _push(seen.norm_J, norm), seen.num_skipped + skip)

    def _is_spike(self, value: Tensor, seen_J: Tensor) -> Tensor:
        known_J = seen_J.isfinite()
        count = known_J.sum()
        mean = seen_J.nansum() / count
        variance = (seen_J - mean).square().nansum() / (count - 1)
        is_outlier = value > mean + self.sigma * variance.sqrt()
        return ~value.isfinite() | (is_outlier & (2 * count >= self.window))


def _push(seen_J: Tensor, value: Tensor) -> Tensor:
    """Return the window with a value at its end; values that are not finite are left out."""
    return torch.where(value.isfinite(), torch.cat([seen_J[1:], value.reshape(1)]), seen_J)
