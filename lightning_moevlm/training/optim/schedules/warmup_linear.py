"""Linear warm-up, then a straight line down, as in V-MoE (arXiv 2106.05974)."""

from torch.optim import Optimizer

from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.training.optim.schedules.warmup import WarmupSchedule


class WarmupLinear(WarmupSchedule):
    """Learning-rate factor: linear warm-up, then linear from 1 to final_ratio.

    Args:
        optimizer: its learning rates are the peaks.
        total_steps: optimiser steps until final_ratio is reached; constant after that.
        warmup: share of total_steps.
        final_ratio: share of the peak at the end.

    Raises:
        UserError: a share outside 0 to 1, or a budget without steps.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, final_ratio: float = 0.0) -> None:
        super().__init__(optimizer, total_steps, warmup, final_ratio)

    def ramp(self) -> Ramp:
        """Return the straight line."""
        return Ramp(1.0, self.final_ratio, max(0, self.total_steps - self.warmup_steps), self.warmup_steps, "linear")
