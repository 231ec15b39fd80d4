"""How long a schedule is: -1, which `${trainer.max_steps}` may be, stands for as many steps as the run will take.

Lightning counts them: max_steps, or what max_epochs, the data and the accumulation come to.
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
"""What ours and torch's call their length."""


def steps_of_run(trainer: Trainer) -> int | None:
    """Return how many optimiser steps end the run; None where only a clock or the user does."""
    estimated = trainer.estimated_stepping_batches
    return int(estimated) if math.isfinite(estimated) and estimated > 0 else None


def build_schedule(factory: Factory, optimizer: Optimizer, num_steps: int | None) -> LRScheduler:
    """Return the schedule over an optimiser, which it sets to its first rates.

    Args:
        factory: as the parser makes it, or a `partial`, whose length of -1 is replaced; of others nothing is known.
        optimizer: its rates are the peaks.
        num_steps: of the run; None where that is not known.

    Raises:
        UserError: the schedule refuses an option, goes by a metric, or follows a run whose length is not known.
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
            f"model.schedule has {names[0]} -1, which is as many optimiser steps as the run takes, and nothing counts "
            "those: trainer.max_steps and trainer.max_epochs are both -1, and a clock (trainer.max_time) counts none; "
            f"set one of the two, or model.schedule.init_args.{names[0]} to a number, or model.schedule to null for a "
            "constant rate"
        )
    return partial(factory, **dict.fromkeys(names, num_steps))


def report_short_run(schedule: LRScheduler, trainer: Trainer) -> None:
    """Say that the run ends before its schedule does: the rate does not come down."""
    length = next((getattr(schedule, name) for name in _LENGTHS if hasattr(schedule, name)), None)
    num_steps = steps_of_run(trainer)
    if isinstance(length, int) and num_steps is not None and num_steps < length:
        by_epochs = trainer.max_epochs not in (-1, None) and not 0 < trainer.max_steps <= num_steps
        limit = f"trainer.max_epochs {trainer.max_epochs}" if by_epochs else f"trainer.max_steps {trainer.max_steps}"
        rank_zero_info(
            f"the run ends at step {num_steps} ({limit}) of a schedule of {length}: the learning rate does not reach "
            f"its end; for a schedule of the run's own length set model.schedule.init_args.total_steps to -1"
        )
