"""Linear warm-up, then cosine decay. The budget is given in steps, never derived from the data's length."""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_moevlm.errors import UserError


class WarmupCosine(LRScheduler):
    """Learning-rate factor: step / warmup while warming up, then a half cosine from 1 to final_ratio.

    Args:
        optimizer: its learning rates are the peak.
        total_steps: optimiser steps until final_ratio is reached; constant from there on.
        warmup_steps: optimiser steps; 5 % of the total is customary.
        final_ratio: share of the peak at the end.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, final_ratio: float = 0.1) -> None:
        if not 0 <= warmup_steps <= total_steps:
            raise UserError(f"warmup_steps is {warmup_steps} with total_steps {total_steps}: choose 0 to {total_steps}")
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.final_ratio = final_ratio
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group at `last_epoch` (= optimiser steps done)."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def factor(self, step: int) -> float:
        """Return the share of the peak at a step; the first step has already 1 / warmup_steps of it."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
