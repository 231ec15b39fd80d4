"""One progress bar over optimiser steps, the unit of budgets; Lightning's bars count epochs."""

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
    """Shows steps done, loss and time left; without a terminal only the last state."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls this on ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the current step."""
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
        """Advance; on logging steps show the loss.

        It is the report's, because Lightning divides `outputs["loss"]` by the micro-batches of a step.
        """
        if self._progress is None:
            return
        self._progress.update(self._task, completed=trainer.global_step)
        if trainer.global_step % log_interval(trainer) == 0 or trainer.global_step == trainer.max_steps:
            self._progress.update(self._task, loss=f"{float(outputs['report'].total_loss):.3f}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show that a validation runs."""
        self._describe("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show that training continues."""
        self._describe("train")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar and restore the terminal."""
        self._close()

    def _describe(self, phase: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=phase)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
