"""AdaGC: clip every tensor's gradient against its own recent norms (arXiv 2502.11034, algorithm 1).

    warming up:  c = min(1, warmup_norm / norm of all)         ema = min(ema, c norm)
    after it:    c = min(1, relative ema / norm of the tensor)  ema = beta ema + (1 - beta) c norm

It cuts one tensor's spike that a global norm would hardly show, and the other gradients keep their size. A stack of
experts is clipped expert by expert. An expert without tokens has a gradient of zero, which is left out of the average:
a zero would silence that expert for good.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.number_checks import check_number


class NormAverages(NamedTuple):
    """State of AdaGC."""

    average_G: Tensor
    """Average norm of each tensor, fp32; infinite until its first gradient."""
    num_steps: Tensor
    """Steps seen, int64."""

    @classmethod
    def empty(cls, num_tensors: int, device: torch.device) -> "NormAverages":
        """Return the averages of no step."""
        return cls(
            torch.full((num_tensors,), torch.inf, dtype=torch.float32, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class AdaGC:
    """Clips each tensor's gradient by its own past norms.

    Args:
        relative: largest norm, as a multiple of the average.
        beta: share of the average that remains after a step.
        warmup_steps: optimiser steps that clip the norm of all gradients.
        warmup_norm: largest norm of all gradients during the warm-up.

    Raises:
        UserError: a value outside its range.
    """

    relative: float = 1.05
    beta: float = 0.98
    warmup_steps: int = 100
    warmup_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("relative", "warmup_norm"):
            check_number(f"ada_gc.{name}", getattr(self, name), above=0)
        check_number("ada_gc.beta", self.beta, above=0, below=1, advice="; the paper's is 0.98")
        check_number("ada_gc.warmup_steps", self.warmup_steps, least=1, advice=": averages need a start")

    def __call__(self, norm_G: Tensor, seen: NormAverages) -> tuple[Tensor, NormAverages]:
        """Return the factor of each gradient, (G,), and the averages after this step; norms are fp32."""
        is_warm = seen.num_steps >= self.warmup_steps
        total = torch.linalg.vector_norm(norm_G)
        limit_G = self.relative * seen.average_G
        local_G = torch.where(norm_G > limit_G, limit_G / norm_G, torch.ones_like(norm_G))
        coefficient_G = torch.where(is_warm, local_G, (self.warmup_norm / total).clamp(max=1.0))
        clipped_G = coefficient_G * norm_G
        average_G = torch.where(
            is_warm & seen.average_G.isfinite(),
            self.beta * seen.average_G + (1 - self.beta) * clipped_G,
            torch.minimum(seen.average_G, clipped_G),
        )
        # a step that is not finite would be clipped to NaN and stay in the averages: it is left to skip_spikes
        is_sound = total.isfinite()
        learns_G = is_sound & (norm_G > 0)
        return (
            torch.where(is_sound, coefficient_G, torch.ones_like(norm_G)),
            NormAverages(torch.where(learns_G, average_G, seen.average_G), seen.num_steps + is_sound),
        )
