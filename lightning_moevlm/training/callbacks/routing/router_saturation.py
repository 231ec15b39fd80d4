"""Measures how early routers settle: the share of their final choices that they make after parts of training.

Router saturation, OLMoE (arXiv 2409.02060, section 5.1): mean over tokens of the overlap of the experts chosen at a
step with those chosen at the end, over the number of experts. Chance is k / E.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.metrics.routing_shift import chosen_experts, chosen_overlap
from lightning_moevlm.training.optim.schedules.schedule_length import steps_of_run
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

Choices = dict[str, Tensor]
"""Experts that a layer chooses for the valid tokens of a modality, bool (T, E) on the CPU, by `block/modality`."""


class RouterSaturation(Callback):
    """Logs the overlap of early choices with final ones, per layer and modality, on held-out samples.

    The samples and their masks stay the same. Costs one forward pass of them per point and one at the end. Changes no
    gradient, weight or random state. A run that is resumed goes on.

    Args:
        at: points of training, each a share of its steps between 0 and 1; 0.01 and 0.4 are OLMoE's. The first point is
            step 1 at the earliest.
        num_samples: from the beginning of the held-out split, at most a batch.

    Raises:
        UserError: a share outside (0, 1), no share, fewer than one sample, or a run without held-out data or with an
            unknown number of steps.
    """

    def __init__(self, at: Sequence[float] = (0.01, 0.1, 0.4), num_samples: int = 32) -> None:
        if not at:
            raise UserError("at of RouterSaturation is empty: name at least one share of training, such as 0.1")
        for share in at:
            check_number("at of RouterSaturation", share, above=0, below=1)
        check_number("num_samples of RouterSaturation", num_samples, least=1)
        self.at = tuple(at)
        self.num_samples = num_samples
        self._chosen: dict[float, Choices] = {}
        self._probe: Batch | None = None
        self._num_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the choices so far."""
        return {"chosen": self._chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the choices so far."""
        self._chosen = state_dict["chosen"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the samples."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets, but declares it not
        if data is None:
            raise UserError("RouterSaturation routes held-out samples: give the trainer a data module")
        num_steps = steps_of_run(trainer)
        if num_steps is None:
            raise UserError("RouterSaturation measures at shares of the steps of a run: set trainer.max_steps")
        self._num_steps = num_steps
        batch = next(iter(data.val_dataloader()))
        self._probe = trainer.strategy.batch_to_device(batch.first(self.num_samples))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """After the step of a point: route the samples."""
        for share in self.at:
            if share not in self._chosen and trainer.global_step >= self._step(share):
                self._chosen[share] = self._route(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Route the samples a last time and log the overlaps, each at its own step."""
        if trainer.global_step < self._num_steps:  # interrupted: what comes after a resume is the end
            return
        final = self._route(trainer, pl_module)
        for share, chosen in self._chosen.items():
            percent = f"{100 * share:g}"
            values = {
                metric_keys.ROUTER_SATURATION.key(percent=percent, **_place(layer)): float(
                    chosen_overlap(chosen[layer], reference_TE)
                )
                for layer, reference_TE in final.items()
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, step=self._step(share))

    def _step(self, share: float) -> int:
        return max(1, round(share * self._num_steps))

    def _route(self, trainer: Trainer, pl_module: LightningModule) -> Choices:
        assert isinstance(pl_module, VisionLanguageModule) and self._probe is not None
        chosen: dict[str, list[Tensor]] = defaultdict(list)
        was_training = pl_module.training
        pl_module.eval()
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            output = pl_module.objective(pl_module.backbone, self._probe, pl_module.draws("val"))
        pl_module.train(was_training)
        for named in output.plans:
            if not isinstance(named.plan, PairPlan):  # soft slots choose no experts
                continue
            chosen_TE = chosen_experts(named.plan)
            for modality in named.modalities:
                own_T = named.plan.valid_T & (named.plan.modality_T == modality)
                chosen[f"{named.block}/{modality.label}"].append(chosen_TE[own_T])
        return {layer: torch.cat(parts).cpu() for layer, parts in chosen.items()}


def _place(layer: str) -> dict[str, Any]:
    block, _, modality = layer.partition("/")
    return {"block": block, "modality": modality}
