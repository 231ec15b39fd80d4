"""Logs what experts have to do with modalities and categories while a model trains, on a small probe.

Nothing is masked, as in `moevlm experts`. A fixed seed chooses the samples from the held-out split, so they stay the
same over a run, its resumptions and the arms of a study.
"""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moevlm.atlas.labels.label_tokens import LabelReader, TokenLabels
from lightning_moevlm.atlas.live.role_counts import RoleCounter
from lightning_moevlm.atlas.probe.probe_set import ProbeSet
from lightning_moevlm.atlas.routing.route import choices_of, encode, move_batch
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

_BATCH = 32


class ExpertRoles(Callback):
    """Logs NMI of experts with modality, category, question kind and class, and each expert's top category.

    Off unless it is configured. A point costs a forward pass of the probe; at the defaults that is less than 2 % of the
    time of training. Changes no gradient, weight or random state.

    Args:
        every_n_steps: optimiser steps between points; the untrained model and the last step are points too.
        num_samples: samples of the probe.

    Raises:
        UserError: fewer than 1 step or sample, a run without shards of held-out samples, or a model without experts.
    """

    def __init__(self, every_n_steps: int = 100, num_samples: int = 64) -> None:
        check_number("every_n_steps of ExpertRoles", every_n_steps, least=1)
        check_number("num_samples of ExpertRoles", num_samples, least=1)
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self._probe: list[_Labelled] = []
        self._reader: LabelReader | None = None
        self._measured = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read and label the samples; measure the untrained model."""
        data: object = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets, but declares it not
        if not isinstance(data, ShardDataModule):
            raise UserError("ExpertRoles routes held-out samples: give the trainer a ShardDataModule")
        assert isinstance(pl_module, VisionLanguageModule)
        probe = ProbeSet(data, "val", self.num_samples)
        self._reader = LabelReader(pl_module.backbone, probe.tokenizer)
        self._probe = [
            _Labelled(move_batch(each.batch, pl_module.device), self._reader(each)) for each in probe.batches(_BATCH)
        ]
        self._measured = trainer.global_step
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """At a point: measure."""
        if trainer.global_step != self._measured and trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end, unless it was a point."""
        if trainer.global_step != self._measured:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule) and self._reader is not None
        self._measured = trainer.global_step
        counter = RoleCounter(self._reader.values)
        was_training = pl_module.training
        pl_module.eval()
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for batch, labels in self._probe:
                plans = encode(pl_module.backbone, pl_module.objective, batch)
                if not plans:
                    raise UserError("ExpertRoles observes experts, and no layer has any for these samples: remove it")
                counter.add(choices_of(plans, self._reader, batch), labels)
        pl_module.train(was_training)
        values = counter.metrics()
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


class _Labelled(NamedTuple):
    """A batch of the probe on the device, and its labels."""

    batch: Batch
    labels: TokenLabels
