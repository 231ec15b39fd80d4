"""Resolves the length of a schedule: -1, as `${trainer.max_steps}` may be, means as many steps as the run takes.

Lightning counts them: max_steps, or the steps of max_epochs with this data and accumulation.
"""

import math
from collections.abc import Callable
from functools import partial

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.checks.optimizer_checks import FAILURES, refuse_unsuited_schedule

Factory = Callable[[Optimizer], LRScheduler]

_LENGTHS = ("total_steps", "T_max", "total_iters")
"""Names of the length in our schedules and in torch's."""


def steps_of_run(trainer: Trainer) -> int | None:
    """Return the optimiser steps of the run; None if only a clock or the user ends it."""
    estimated = trainer.estimated_stepping_batches
    return int(estimated) if math.isfinite(estimated) and estimated > 0 else None


def build_schedule(factory: Factory, optimizer: Optimizer, num_steps: int | None) -> LRScheduler:
    """Return the schedule of an optimiser, which gets its first rates.

    Args:
        factory: the parser's, or a `partial`, in which a length of -1 is replaced; others stay as they are.
        optimizer: its rates are the peaks.
        num_steps: of the run; None if unknown.

    Raises:
        UserError: the schedule refuses an option, follows a metric, or needs the unknown length of the run.
    """
    whole = _with_length(factory, num_steps)
    try:
        schedule = whole(optimizer)
    except UserError:
        raise
    except FAILURES as error:
        raise UserError(f"model.schedule cannot be built: {error}; change its options") from error
    refuse_unsuited_schedule(schedule)
    return schedule


def _with_length(factory: Factory, num_steps: int | None) -> Factory:
    given = factory.keywords if isinstance(factory, partial) else {}
    names = [name for name in _LENGTHS if given.get(name) == -1]
    if not names:
        return factory
    if num_steps is None:
        raise UserError(
            f"model.schedule has {names[0]} -1, as many optimiser steps as the run takes, but that number is unknown: "
            "trainer.max_steps and trainer.max_epochs are both -1, and trainer.max_time counts no steps; set "
            f"one of the two, or model.schedule.init_args.{names[0]} to a number, or model.schedule to null"
        )
    return partial(factory, **dict.fromkeys(names, num_steps))


def report_short_run(schedule: LRScheduler, trainer: Trainer) -> None:
    """Report that the run ends before its schedule, so the rate stays above its end; a fast_dev_run always does."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        return
    length = next((getattr(schedule, name) for name in _LENGTHS if hasattr(schedule, name)), None)
    num_steps = steps_of_run(trainer)
    if isinstance(length, int) and num_steps is not None and num_steps < length:
        by_epochs = trainer.max_epochs not in (-1, None) and not 0 < trainer.max_steps <= num_steps
        limit = f"trainer.max_epochs {trainer.max_epochs}" if by_epochs else f"trainer.max_steps {trainer.max_steps}"
        rank_zero_info(
            f"the run ends at step {num_steps} ({limit}) of a schedule of {length} steps, before the learning rate "
            f"reaches its end; for a schedule of the run's length set model.schedule.init_args.total_steps to -1"
        )
