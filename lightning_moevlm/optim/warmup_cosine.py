"""Linear warm-up, then cosine decay. The budget is given in steps, never derived from the data's length."""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_moevlm.errors import UserError

_PROGRESS = ("last_epoch", "_step_count", "_last_lr")


class WarmupCosine(LRScheduler):
    """Learning-rate factor: linear while warming up, then a half cosine from 1 to final_ratio.

    A checkpoint keeps how far the schedule is, not its shape: whoever resumes with another budget gets the schedule of
    that budget.

    Args:
        optimizer: its learning rates are the peak.
        total_steps: optimiser steps until final_ratio is reached; constant from there on.
        warmup: share of total_steps; 0.05 is customary, at small budgets more.
        final_ratio: share of the peak at the end.

    Raises:
        UserError: a share outside 0 to 1, or a budget without steps.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, final_ratio: float = 0.1) -> None:
        if total_steps < 1:
            raise UserError(f"total_steps of the schedule is {total_steps}: give a budget of 1 optimiser step or more")
        for name, share in (("warmup", warmup), ("final_ratio", final_ratio)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} of the schedule is {share}: choose a share from 0 to 1")
        self.total_steps = total_steps
        self.warmup_steps = round(warmup * total_steps)
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

    def state_dict(self) -> dict[str, Any]:
        """Return how far the schedule is."""
        return {name: value for name, value in super().state_dict().items() if name in _PROGRESS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, with the shape and the peak of this schedule."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name in _PROGRESS})
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
