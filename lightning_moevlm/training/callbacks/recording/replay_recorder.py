"""Records every step of a replay, and ends it.

`trainer.max_steps` stays that of the run, because schedules and ramps are as long as the run.
"""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.study.forensics.watch import WINDOW
from lightning_moevlm.tracking.recordings.recording import REPLAY_FILE, REPLAY_FOLDER
from lightning_moevlm.training import StepOutput
from lightning_moevlm.training.callbacks.recording.flight_recorder import FlightRecorder


class ReplayRecorder(FlightRecorder):
    """Writes one recording of all steps to `RUN/replay/`, whatever happens in them. `moevlm replay` adds it.

    Args:
        last_step: optimiser step after which training ends.

    Raises:
        UserError: a step below 1.
    """

    def __init__(self, last_step: int) -> None:
        check_number("last_step of ReplayRecorder", last_step, least=1)
        super().__init__(keep=max(2 * WINDOW, last_step), max_checkpoints=0)
        self.last_step = last_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin; nothing is validated, so what a validation decides cannot end a replay."""
        super().on_train_start(trainer, pl_module)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set, but not declared
        trainer.callbacks = [each for each in callbacks if not isinstance(each, EarlyStopping)]  # type: ignore[attr-defined]

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        """Record, and stop after the last step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step >= self.last_step:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all steps."""
        super().on_train_end(trainer, pl_module)
        self._write_whole(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write them after a crash too; a replay that a signal ends is done again."""
        before = len(self._events) if self._is_on else 0
        super().on_exception(trainer, pl_module, exception)
        if self._is_on and len(self._events) > before:
            self._write_whole(trainer)

    def _write_whole(self, trainer: Trainer) -> None:
        if self._is_on and trainer.is_global_zero:
            self._write_to(trainer, REPLAY_FOLDER, REPLAY_FILE, self._events)
