"""Tries a schedule on a throwaway optimiser before anything is written, and refuses it if that fails.

torch's schedules check few options: StepLR divides by step_size 0 at the first step, OneCycleLR raises one step after
its last. The trial costs microseconds per step and moves no weight.
"""

import math
import warnings

from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.checks.optimizer_checks import FAILURES
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

_MOST_STEPS = 1000


def try_schedule(module: VisionLanguageModule, max_steps: int = -1, is_endless: bool = False) -> None:
    """Build the optimiser and the schedule of a run, and step the schedule as training would, at most 1000 times.

    Args:
        module: owns the optimiser and the schedule.
        max_steps: of the run; below 1 it is unknown, and one step is tried.
        is_endless: neither steps nor epochs end the run; otherwise their number is known when training starts.

    Raises:
        UserError: one of them cannot be built, or the schedule fails, ends too early or gives an invalid rate.
    """
    optimizer = module.build_optimizer()
    assumed = None if is_endless else _MOST_STEPS
    schedule = module.build_schedule(optimizer, max_steps if max_steps > 0 else assumed)
    if schedule is None:
        return
    name = type(schedule).__name__
    if isinstance(schedule, OneCycleLR) and schedule.total_steps < max_steps:
        raise UserError(
            f"model.schedule {name} has total_steps {schedule.total_steps}, below trainer.max_steps {max_steps}: set "
            "total_steps to ${trainer.max_steps}"
        )
    for step in range(1, 1 + max(1, min(max_steps, _MOST_STEPS))):
        _step(schedule, step)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise UserError(
                f"model.schedule {name} gives the learning rate {min(rates):g} after step {step}: change its options"
            )


def _step(schedule: LRScheduler, step: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)`")
        try:
            schedule.step()
        except FAILURES as error:
            raise UserError(
                f"model.schedule {type(schedule).__name__} fails after step {step}: {error}; change its options"
            ) from error
