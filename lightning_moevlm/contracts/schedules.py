"""A number that may change while training: a plain float, or a ramp over optimiser steps.

    value(step) = start                                       before `begin`
                = (1 - f(p)) start + f(p) stop                p = (step - begin) / num_steps in [0, 1]
                = stop                                        from begin + num_steps on

    f(p) = p                    linear
         = (1 - cos(pi p)) / 2  cosine, flat at both ends (SGDR, arXiv 1608.03983)
         = sqrt(p)              sqrt; from 1 to 0 it is the "1-sqrt" cool-down of arXiv 2405.18392, section 3

An option of type `Schedule` takes `weight: 0.01` or `weight: {start: 0.0, stop: 0.01, num_steps: 1000}`. Read it with
`value_at(schedule, step)`. A schedule has no state, so a resumed run gets the same values.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number

Shape: TypeAlias = Literal["linear", "cosine", "sqrt"]


@dataclass(frozen=True)
class Ramp:
    """A value that changes from one number to another.

    Args:
        start: value until `begin`.
        stop: value from `begin + num_steps` on.
        num_steps: optimiser steps that the change takes; 0 changes it at once.
        begin: optimiser steps before it begins.
        shape: "linear", "cosine" (slow at both ends) or "sqrt" (fast at first).

    Raises:
        UserError: negative steps, or ends that are not finite.
    """

    start: float
    stop: float
    num_steps: int
    begin: int = 0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        for name, count in (("num_steps", self.num_steps), ("begin", self.begin)):
            check_number(f"{name} of a ramp", count, least=0, advice=" optimiser steps")
        for name, end in (("start", self.start), ("stop", self.stop)):
            if not math.isfinite(end):
                raise UserError(f"{name} of a ramp is {end}: give a finite number")

    def __call__(self, step: int) -> float:
        """Return the value after `step` optimiser steps."""
        if step < self.begin:
            return self.start
        if step >= self.begin + self.num_steps:
            return self.stop
        fraction = _FRACTION[self.shape]((step - self.begin) / self.num_steps)
        return (1 - fraction) * self.start + fraction * self.stop  # this form is exact at both ends


Schedule: TypeAlias = float | Ramp
"""A constant, or a value that changes over optimiser steps."""


def value_at(schedule: Schedule, step: int) -> float:
    """Return the value of a schedule after `step` optimiser steps."""
    return schedule(step) if isinstance(schedule, Ramp) else schedule


_FRACTION = {"linear": lambda p: p, "cosine": lambda p: 0.5 * (1 - math.cos(math.pi * p)), "sqrt": math.sqrt}
