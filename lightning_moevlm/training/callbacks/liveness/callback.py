"""Asks every enabled switch, during the run, to prove that it acts; a dead one ends the run by name.

Before the first step, every n steps and before the last step, the first samples of the batch are rehearsed
(rehearsal.py). Each auxiliary loss, stabiliser, action and pinned dtype is asked for its proof (the files beside this
one). A receipt becomes a tag of the run, `receipt/<switch>`, and its number a metric, `liveness/<switch>`. A tag is
written when its verdict changes and when training ends. The share of the gradient from balance losses is logged too.
"""

from collections.abc import Callable, Sequence
from typing import get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.training import StepOutput, VisionLanguageModule
from lightning_moevlm.training.callbacks.liveness.action_proofs import ActionProofs
from lightning_moevlm.training.callbacks.liveness.balance_share import balance_share
from lightning_moevlm.training.callbacks.liveness.gradient_proofs import ActivityCounter, gradient_receipts
from lightning_moevlm.training.callbacks.liveness.init_proofs import init_receipts, upcycling_receipts
from lightning_moevlm.training.callbacks.liveness.loss_proofs import loss_receipts
from lightning_moevlm.training.callbacks.liveness.precision_proofs import precision_receipts
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt, Verdict
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal
from lightning_moevlm.training.callbacks.liveness.routing_proofs import routing_receipts
from lightning_moevlm.training.callbacks.liveness.trunk_proofs import trunk_receipts
from lightning_moevlm.training.callbacks.telemetry import TakesTags
from lightning_moevlm.training.checks.trainer_checks import SHARDING

_WORDS: dict[Verdict, str] = {
    "alive": "act",
    "idle": "not triggered yet",
    "off": "off",
    "unproven": "unproven",
    "dead": "dead",
}


class Liveness(Callback):
    """Asks every enabled switch to prove that it acts, and writes the receipts.

    Training is the same, bit for bit, with and without it. Nothing is asked while the loss is not finite, nor under
    strategies that shard weights, because no rank can run a layer alone.

    Args:
        every_n_steps: optimiser steps between checks; each costs about two steps. null checks only before the run's
            first step.
        num_samples: samples of the batch that are rehearsed.

    Raises:
        UserError: fewer than 1 step or sample; while training, a dead switch, by name.
    """

    def __init__(self, every_n_steps: int | None = 100, num_samples: int = 8) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_samples", num_samples)):
            if value is not None and value < 1:
                raise UserError(f"{name} of Liveness is {value}: choose 1 or more")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self._acts = ActivityCounter()
        self._actions = ActionProofs()
        self._tags: dict[str, str] = {}
        self._tags_written: dict[str, str] = {}
        self._has_asked = False
        self._started_at = 0
        self._step_seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where training starts."""
        self._acts, self._actions, self._has_asked = ActivityCounter(), ActionProofs(), False
        self._tags, self._tags_written = {}, {}
        self._started_at = self._step_seen = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Ask before the step, if a check is due.

        Raises:
            UserError: a dead switch.
        """
        assert isinstance(pl_module, VisionLanguageModule)
        micro_step = pl_module.micro_step(batch_idx)
        if not self._is_due(trainer, micro_step):
            return
        self._has_asked = True
        if isinstance(trainer.strategy, SHARDING):
            if trainer.global_step == self._started_at:
                rank_zero_info(f"liveness: not checked, because {type(trainer.strategy).__name__} shards the weights")
            return
        rehearsal = Rehearsal(trainer, pl_module, batch, self.num_samples, micro_step)
        if self._anywhere(trainer, ~rehearsal.is_sound):
            return  # nothing can be shown with a loss that is not finite; DivergenceGuard answers it
        receipts = [
            *loss_receipts(rehearsal, trainer.optimizers),
            *routing_receipts(rehearsal),
            *trunk_receipts(rehearsal),
            *init_receipts(pl_module, is_fresh=trainer.global_step == 0),
            *upcycling_receipts(pl_module, is_fresh=trainer.global_step == 0),
            *gradient_receipts(trainer, pl_module, self._acts.read()),
            *self._actions.receipts(rehearsal, trainer),
            *precision_receipts(rehearsal, trainer),
        ]
        values = {
            metric_keys.LIVENESS.key(switch=receipt.switch): receipt.point
            for receipt in receipts
            if receipt.point is not None
        } | balance_share(rehearsal)
        self._write(trainer, receipts, values)
        self._fail_if_dead(trainer, receipts)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        """After an update, count the stabilisers that acted."""
        assert isinstance(pl_module, VisionLanguageModule)
        if trainer.global_step != self._step_seen:
            self._step_seen = trainer.global_step
            if pl_module.gradient_events is not None:
                self._acts.add(pl_module.gradient_events)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the receipts in their last state."""
        self._write_tags(trainer, key=str)

    def _is_due(self, trainer: Trainer, micro_step: int) -> bool:
        """Return whether this micro-batch is the run's first, which may lie within a step, or a check is due."""
        if not self._has_asked:
            return True
        if self.every_n_steps is None or micro_step % trainer.accumulate_grad_batches:
            return False
        return trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps - 1

    def _write(self, trainer: Trainer, receipts: Sequence[Receipt], values: dict[str, float]) -> None:
        step = trainer.global_step
        self._tags = {f"receipt/{receipt.switch}": receipt.describe(step) for receipt in receipts}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        self._write_tags(trainer, key=_verdict)
        if step == self._started_at and receipts:
            counts = {verdict: sum(one.verdict == verdict for one in receipts) for verdict in get_args(Verdict)}
            text = ", ".join(f"{count} {_WORDS[name]}" for name, count in counts.items() if count)
            is_tagged = any(isinstance(logger, TakesTags) for logger in trainer.loggers)
            rank_zero_info(f"liveness of switches: {text}{' (receipts: MLflow tags receipt/*)' if is_tagged else ''}")

    def _write_tags(self, trainer: Trainer, key: Callable[[str], str]) -> None:
        """Write the tags whose key differs from that of the tag last written."""
        written = self._tags_written
        fresh = {tag: now for tag, now in self._tags.items() if key(now) != key(written.get(tag, ""))}
        for logger in trainer.loggers:
            if fresh and isinstance(logger, TakesTags):
                logger.log_tags(fresh)
        written.update(fresh)

    def _fail_if_dead(self, trainer: Trainer, receipts: Sequence[Receipt]) -> None:
        """End the run on every rank where a switch is dead on one of them."""
        is_dead = torch.tensor([one.verdict == "dead" for one in receipts], device=trainer.strategy.root_device)
        dead = self._anywhere(trainer, is_dead)
        if not dead:
            return
        step = trainer.global_step
        when = "before the first step" if step == 0 else f"after {step} steps"
        lines = [
            f"{one.switch} is dead {when}: {one.evidence}; {one.advice}"
            if one.verdict == "dead"
            else f"{one.switch} is dead {when} on another rank"
            for place, one in enumerate(receipts)
            if place in dead
        ]
        raise UserError(". ".join(lines))

    @staticmethod
    def _anywhere(trainer: Trainer, flags: Tensor) -> set[int]:
        """Return the places of flags that are set on any rank; all ranks must call it."""
        own = flags.reshape(-1).float()
        found = trainer.strategy.reduce(own, reduce_op="max") if len(own) else own
        assert isinstance(found, Tensor)
        return set(found.nonzero().flatten().tolist())


def _verdict(tag: str) -> str:
    return tag.partition(":")[0]
