"""A warm-up and a half cosine with a jump of the learning rate in between: a known fault, to test stabilisers with.

    factor(step) = jump x the factor of WarmupCosine    for begin <= step < begin + num_steps
                 = the factor of WarmupCosine           otherwise

A resumed run meets such a jump if its schedule or its rate differs from that of the checkpoint.
"""

from torch.optim import Optimizer

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.training.optim.schedules.warmup_cosine import WarmupCosine


class RateJump(WarmupCosine):
    """WarmupCosine whose rate is multiplied for some steps.

    Args:
        optimizer: its learning rates are the peaks.
        total_steps: optimiser steps until final_ratio is reached; constant after that.
        warmup: share of total_steps.
        final_ratio: share of the peak at the end.
        begin: optimiser steps before the jump.
        num_steps: length of the jump in optimiser steps.
        jump: factor on the rate.

    Raises:
        UserError: a value outside its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.05,
        final_ratio: float = 0.1,
        begin: int = 0,
        num_steps: int = 1,
        jump: float = 10.0,
    ) -> None:
        check_number("begin of the jump", begin, least=0, advice=" optimiser steps")
        check_number("num_steps of the jump", num_steps, least=1, advice=" optimiser steps")
        check_number("jump of the schedule", jump, above=0)
        self.begin, self.num_steps, self.jump = begin, num_steps, jump
        super().__init__(optimizer, total_steps, warmup, final_ratio)

    def factor(self, step: int) -> float:
        """Return the share of the peak at a step."""
        jumps = self.begin <= step < self.begin + self.num_steps
        return super().factor(step) * (self.jump if jumps else 1.0)
