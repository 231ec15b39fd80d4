"""Warm-up, a long constant stretch, a short decay (WSD): one trunk serves many budgets.

The decay of "1-sqrt" falls fast at first and ends below the linear one (Haegele et al., arXiv 2405.18392, section 3);
WSD itself comes from MiniCPM (arXiv 2404.06395, section 4).
"""

from typing import Literal

from torch.optim import Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.training.optim.schedules.warmup import WarmupSchedule, check_share


class WarmupStableDecay(WarmupSchedule):
    """Learning-rate factor: linear warm-up, 1, then down to final_ratio over the last steps.

    Args:
        optimizer: its learning rates are the peaks.
        total_steps: optimiser steps until final_ratio is reached; constant after that.
        warmup: share of total_steps.
        decay: share of total_steps at the end; 0 keeps the peak for ever.
        decay_shape: "sqrt" (1 - sqrt) or "linear".
        final_ratio: share of the peak at the end.

    Raises:
        UserError: a share outside 0 to 1, warm-up and decay that overlap, or a budget without steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.05,
        decay: float = 0.2,
        decay_shape: Literal["sqrt", "linear"] = "sqrt",
        final_ratio: float = 0.0,
    ) -> None:
        check_share("decay", decay)
        if warmup + decay > 1:
            raise UserError(f"warmup {warmup} and decay {decay} of the schedule overlap: their sum is at most 1")
        self.decay_steps = round(decay * total_steps)
        self.decay_shape = decay_shape
        super().__init__(optimizer, total_steps, warmup, final_ratio)

    def ramp(self) -> Ramp:
        """Return the decay at the end of the budget."""
        begin = max(self.warmup_steps, self.total_steps - self.decay_steps)
        end = self.final_ratio if self.decay_steps else 1.0
        return Ramp(1.0, end, self.total_steps - begin, begin, self.decay_shape)
