"""Stops a run whose loss is no longer finite. Divergence is an outcome to record, not a crash."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.training import StepOutput, VisionLanguageModule


class DivergenceGuard(Callback):
    """Ends training cleanly after a loss that is not finite on any rank, and logs the first such step.

    Every loss is checked on its device; the host waits for the result every n steps. If such steps are skipped
    (`model.gradient.skip_spikes`), the weights stay sound, so the run has diverged only after n such batches in a row.
    As long as a rollback can answer, the guard does nothing.

    Args:
        every_n_steps: optimiser steps between waits for the device.

    Raises:
        UserError: fewer than 1 step.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        check_number("every_n_steps of DivergenceGuard", every_n_steps, least=1)
        self.every_n_steps = every_n_steps
        self.diverged_at: int | None = None
        """The first step whose loss was not finite, as of the last wait."""
        self._has_logged = False
        self._first_bad: Tensor | None = None  # int64, on the device; the largest int64 while all losses are finite
        self._bad_in_a_row: Tensor | None = None  # int64, on the device: batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset."""
        self._has_logged = False
        self._first_bad = torch.full((), torch.iinfo(torch.int64).max, dtype=torch.int64, device=pl_module.device)
        self._bad_in_a_row = torch.zeros((), dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        """Check the loss; every n steps and at the last one, on all ranks."""
        assert self._first_bad is not None and self._bad_in_a_row is not None
        assert isinstance(pl_module, VisionLanguageModule)
        if pl_module.can_roll_back:
            return
        adds = trainer.fit_loop._should_accumulate()  # the batch only added to the gradient of the step
        step = trainer.global_step + adds
        patience = 1 if pl_module.gradient.skip_spikes is None else self.every_n_steps
        self._bad_in_a_row = torch.where(outputs["loss"].isfinite(), 0, self._bad_in_a_row + 1)
        is_bad = self._bad_in_a_row >= patience
        self._first_bad = torch.where(is_bad, self._first_bad.clamp(max=step), self._first_bad)
        if not adds and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check once more, in case training ended between two waits."""
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if not self._has_logged and self.has_diverged(trainer):
            assert self.diverged_at is not None
            for logger in trainer.loggers:
                logger.log_metrics({metric_keys.FIRST_NONFINITE_STEP.key(): self.diverged_at}, step=trainer.global_step)
            self._has_logged = trainer.should_stop = True

    def has_diverged(self, trainer: Trainer) -> bool:
        """Set `diverged_at` over all ranks and return whether there is one; all ranks must call it together."""
        if self._first_bad is None:
            return False
        first = int(-trainer.strategy.reduce(-self._first_bad.double(), reduce_op="max"))
        self.diverged_at = first if first <= trainer.global_step + 1 else None  # 1: within an accumulation
        return self.diverged_at is not None
