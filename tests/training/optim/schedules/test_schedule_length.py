"""A schedule of -1 steps is as long as the run, however it ends; an unfinished one is reported."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training import VisionLanguageModule, try_schedule
from lightning_moevlm.training.optim import WarmupCosine
from tests.small_model import pair_batch, small_vl_moe

FOLLOWS = partial(WarmupCosine, total_steps=-1)


def schedule_of(factory: Callable[[Optimizer], LRScheduler], **options: Any) -> Any:
    """Train on four batches and return the schedule."""
    module = VisionLanguageModule(small_vl_moe(), schedule=factory)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", logger=False, **quiet, **options)
    trainer.fit(module, DataLoader([pair_batch()] * 4, batch_size=None))  # type: ignore[arg-type]
    return module.lr_schedulers()


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"max_epochs": 1}, 4),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 4),
        ({"max_epochs": 2, "max_steps": 3}, 3),
        ({"max_epochs": -1, "max_steps": 3}, 3),
    ],
)
def test_a_schedule_of_a_run_counted_in_epochs_is_as_long_as_the_run(options: dict[str, int], length: int) -> None:
    schedule = schedule_of(FOLLOWS, **options)
    assert schedule.total_steps == schedule.last_epoch == length
    assert schedule.get_last_lr()[0] == pytest.approx(0.1 * schedule.base_lrs[0])


def test_torchs_own_schedules_follow_the_run_too() -> None:
    assert schedule_of(partial(CosineAnnealingLR, T_max=-1), max_epochs=1).T_max == 4


def test_with_a_clock_alone_a_schedule_asks_for_a_number_or_a_constant_rate() -> None:
    told = "total_steps -1, .* trainer.max_steps and trainer.max_epochs are both -1, .* model.schedule to null"
    with pytest.raises(UserError, match=told):
        try_schedule(VisionLanguageModule(small_vl_moe(), schedule=FOLLOWS), is_endless=True)
    with pytest.raises(UserError, match=told):
        schedule_of(FOLLOWS, max_epochs=-1, max_steps=-1, max_time="00:00:00:01")
    try_schedule(VisionLanguageModule(small_vl_moe()), is_endless=True)


@pytest.mark.parametrize(
    ("total", "options", "told"),
    [
        (80, {"max_epochs": 1, "max_steps": 80}, "the run ends at step 4 (trainer.max_epochs 1) of a schedule of 80"),
        (80, {"max_epochs": -1, "max_steps": 3}, "the run ends at step 3 (trainer.max_steps 3) of a schedule of 80"),
        (3, {"max_epochs": -1, "max_steps": 3}, ""),
        (2, {"max_epochs": 1}, ""),  # the rate stays where the schedule ends
        (80, {"max_epochs": 1, "fast_dev_run": True}, ""),
    ],
)
def test_a_run_that_ends_before_its_schedule_is_reported(
    total: int, options: dict[str, int], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch")
    schedule_of(partial(WarmupCosine, total_steps=total), **options)
    lines = [record.getMessage() for record in caplog.records if "of a schedule of" in record.getMessage()]
    assert len(lines) == bool(told) and all(line.startswith(told) for line in lines)
