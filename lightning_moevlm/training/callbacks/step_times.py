"""Records the wall times of steps and validations, to estimate the duration of runs."""

import json
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.training import StepOutput


class StepTimes(Callback):
    """Writes a JSON file with `step_seconds` and `validation_seconds`, in order, at the end of training.

    A step lasts from the end of the one before to its own end, data included, validations excluded. It waits for the
    device after each step, so use it only in probes.

    Args:
        file: target, written on rank 0.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.step_seconds: list[float] = []
        self.validation_seconds: list[float] = []
        self._step_began: float | None = None
        self._validation_began = 0.0
        self._steps_seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with the first step."""
        self._step_began, self._steps_seen = time.perf_counter(), trainer.global_step

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        """Record a step if the optimiser has made one."""
        if trainer.global_step == self._steps_seen or self._step_began is None:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self.step_seconds.append(now - self._step_began)
        self._step_began, self._steps_seen = now, trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the beginning."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the duration, and subtract it from the current step."""
        seconds = time.perf_counter() - self._validation_began
        self.validation_seconds.append(seconds)
        if self._step_began is not None:
            self._step_began += seconds

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if trainer.is_global_zero:
            times = {"step_seconds": self.step_seconds, "validation_seconds": self.validation_seconds}
            self.file.write_text(json.dumps(times), encoding="utf-8")
