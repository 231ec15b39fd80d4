"""The guard names the step that is not finite, also when it is the first micro-batch of an accumulation."""

from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moevlm.training.actions import Actions
from lightning_moevlm.training.callbacks import DivergenceGuard, LastCheckpoint
from tests.small_model import pair_batch
from tests.training.small_fit import Poison, fit, tiny_module


class SaveWithin(Callback):
    """Asks for `last.ckpt` between the micro-batches of a step."""

    def __init__(self, last: LastCheckpoint, at_step: int) -> None:
        self.last, self.at_step = last, at_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step + 1 == self.at_step and trainer.fit_loop._should_accumulate():
            self.last._save(trainer)


@pytest.mark.parametrize("every_n_steps", [1, 4])
def test_the_step_of_a_bad_micro_batch_is_named(every_n_steps: int) -> None:
    guard = DivergenceGuard(every_n_steps)
    batches = [pair_batch()] * 30
    points = fit(tiny_module(Actions()), 10, batches=batches, callbacks=[Poison(6), guard], accumulate=3).points
    waited = 6 if every_n_steps == 1 else 8
    assert points["stability/first_nonfinite_step"] == [(waited, 6.0)] and guard.diverged_at == 6


def test_nothing_is_saved_after_a_bad_micro_batch(tmp_path: Path) -> None:
    """The first micro-batch of step 3 is bad, and its step is not complete yet."""
    last = LastCheckpoint()
    fit(
        tiny_module(Actions()), 4, batches=[pair_batch()] * 8, accumulate=2, default_root_dir=tmp_path,
        callbacks=[Poison(3), DivergenceGuard(10), last, SaveWithin(last, at_step=3)],
    )  # fmt: skip
    assert list(tmp_path.rglob("*.ckpt")) == []
