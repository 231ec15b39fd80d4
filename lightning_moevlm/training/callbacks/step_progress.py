"""One progress bar over optimiser steps: the unit of every budget here. Lightning's bars count epochs."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.training import StepOutput
from lightning_moevlm.training.optim.schedules.schedule_length import steps_of_run
from lightning_moevlm.training.step.logging_steps import log_interval


class StepProgress(ProgressBar):
    """Steps done, loss, time left; nothing but the last state where the output is no terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls this on ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Show it again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar where training goes on."""
        if not self._enabled:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, loss {task.fields[loss]},"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(
            "train", total=steps_of_run(trainer), completed=trainer.global_step, loss="-"
        )
        self._progress.start()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        """Move on; the loss is read from the device on logging steps alone.

        It is the report's: Lightning has divided `outputs["loss"]` by the micro-batches of a step.
        """
        if self._progress is None:
            return
        self._progress.update(self._task, completed=trainer.global_step)
        if trainer.global_step % log_interval(trainer) == 0 or trainer.global_step == trainer.max_steps:
            self._progress.update(self._task, loss=f"{float(outputs['report'].total_loss):.3f}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why the bar stands still."""
        self._describe("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._describe("train")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _describe(self, phase: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=phase)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
