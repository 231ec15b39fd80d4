"""Stops a run whose loss is no longer a number. Divergence is an outcome to record, not a crash."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moevlm import keys
from lightning_moevlm.records import Batch
from lightning_moevlm.training import StepOutput


class DivergenceGuard(Callback):
    """Ends training cleanly after a non-finite loss, and logs the step.

    Args:
        every_n_steps: optimiser steps between looks; each look waits for the device.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        """Look at the loss."""
        if trainer.global_step % self.every_n_steps or math.isfinite(float(outputs["loss"])):
            return
        for logger in trainer.loggers:
            logger.log_metrics({keys.FIRST_NONFINITE_STEP.key(): trainer.global_step}, step=trainer.global_step)
        trainer.should_stop = True
