"""Stops a run whose loss is no longer a number. Divergence is an outcome to record, not a crash."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.training import StepOutput, VisionLanguageModule


class DivergenceGuard(Callback):
    """Ends training cleanly after a non-finite loss on any rank, and logs the first such step.

    Every loss is looked at on its device; only every n steps the host waits for the answer. Where such steps are left
    out (`model.gradient.skip_spikes`), weights are still sound after one: the run has diverged when the losses of n
    batches in a row are no numbers. While a rollback will answer the next such loss, it is not the guard's business.

    Args:
        every_n_steps: optimiser steps between waits.

    Raises:
        UserError: fewer than 1 step.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        check_number("every_n_steps of DivergenceGuard", every_n_steps, least=1)
        self.every_n_steps = every_n_steps
        self.diverged_at: int | None = None
        """The first step whose loss was not a number, as far as was asked."""
        self._has_logged = False
        self._first_bad: Tensor | None = None  # int64, on the device; a huge number while all is well
        self._bad_in_a_row: Tensor | None = None  # int64, on the device: batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with a clean record."""
        self._has_logged = False
        self._first_bad = torch.full((), torch.iinfo(torch.int64).max, dtype=torch.int64, device=pl_module.device)
        self._bad_in_a_row = torch.zeros((), dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        """Look at the loss; now and then, and at the last step, ask all ranks."""
        assert self._first_bad is not None and self._bad_in_a_row is not None
        assert isinstance(pl_module, VisionLanguageModule)
        if pl_module.can_roll_back:
            return
        step = trainer.global_step
        patience = 1 if pl_module.gradient.skip_spikes is None else self.every_n_steps
        self._bad_in_a_row = torch.where(outputs["loss"].isfinite(), 0, self._bad_in_a_row + 1)
        is_bad = self._bad_in_a_row >= patience
        self._first_bad = torch.where(is_bad, self._first_bad.clamp(max=step), self._first_bad)
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask once more, where training ended between two waits."""
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if not self._has_logged and self.has_diverged(trainer):
            assert self.diverged_at is not None
            for logger in trainer.loggers:
                logger.log_metrics({metric_keys.FIRST_NONFINITE_STEP.key(): self.diverged_at}, step=trainer.global_step)
            self._has_logged = trainer.should_stop = True

    def has_diverged(self, trainer: Trainer) -> bool:
        """Ask all ranks, who ask at once; `diverged_at` then tells the step."""
        if self._first_bad is None:
            return False
        first = int(-trainer.strategy.reduce(-self._first_bad.double(), reduce_op="max"))
        self.diverged_at = first if first <= trainer.global_step else None
        return self.diverged_at is not None
