"""The contract of learning-rate schedules: linear warm-up, then a ramp down. Budgets are steps, never epochs.

    factor(step) = (step + 1) / warmup_steps    during the warm-up: the first step is not lost
                 = ramp(step)                   after it, from 1 to final_ratio

Every parameter group follows the same factor, each from its own peak.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.schedules import Ramp

_PROGRESS = ("last_epoch", "_step_count", "_last_lr")


class WarmupSchedule(LRScheduler, ABC):
    """Learning-rate factor over optimiser steps.

    A checkpoint keeps the position of the schedule, not its shape: a run resumed with another budget follows the
    schedule of that budget.

    Args:
        optimizer: its learning rates are the peaks.
        total_steps: optimiser steps until final_ratio is reached; constant after that. In a configuration -1, as
            `${trainer.max_steps}` may be, means as many as the run takes.
        warmup: share of total_steps.
        final_ratio: share of the peak at the end.

    Raises:
        UserError: a share outside 0 to 1, or a budget without steps.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float, final_ratio: float) -> None:
        check_number("total_steps of the schedule", total_steps, least=1, advice=" optimiser steps")
        check_share("warmup", warmup)
        check_share("final_ratio", final_ratio)
        self.total_steps = total_steps
        self.warmup_steps = round(warmup * total_steps)
        self.final_ratio = final_ratio
        self._ramp = self.ramp()
        super().__init__(optimizer)

    @abstractmethod
    def ramp(self) -> Ramp:
        """Return the factor after the warm-up, from 1 to final_ratio."""

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group at `last_epoch` (= optimiser steps done)."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def factor(self, step: int) -> float:
        """Return the share of the peak at a step."""
        return (step + 1) / self.warmup_steps if step < self.warmup_steps else self._ramp(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the schedule."""
        return {name: value for name, value in super().state_dict().items() if name in _PROGRESS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the position; shape and peaks stay those of this schedule."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name in _PROGRESS})
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


def check_share(name: str, share: float) -> None:
    """Refuse a value that is not a share.

    Raises:
        UserError: outside 0 to 1.
    """
    check_number(f"{name} of the schedule", share, least=0, most=1)
