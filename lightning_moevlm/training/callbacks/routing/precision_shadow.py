"""Measures the harm of narrow dtypes: on sampled steps a slice of the batch runs again with every region in fp32.

Both runs use the weights, masks and noise of the step; the slice is routed as its own batch. The fp32 run widens the
weights, so it shows the error of arithmetic (and of rounded weights, if the policy simulates), not that of weights
stored narrow. Deeper layers include the errors below them. For each narrow region, a third run keeps only this region
as trained and all others in fp32. Modules swapped in by a library (fp8 linears) stay unchanged.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.contracts.step_records import NamedPlan, ObjectiveOutput, Term
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.metrics import routing_shift
from lightning_moevlm.model.objectives import Draws, Objective
from lightning_moevlm.model.precision import (
    REGIONS,
    PrecisionPolicy,
    Region,
    float32_everywhere,
    use_precision,
)
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.half_precision import TRAINER_DTYPE
from lightning_moevlm.training.step.logging_steps import log_interval

_SHIFTS = {
    "flip_rate": metric_keys.SHADOW_FLIP_RATE,
    "logit_error_max": metric_keys.SHADOW_LOGIT_ERROR_MAX,
    "logit_error_rms": metric_keys.SHADOW_LOGIT_ERROR_RMS,
}


class PrecisionShadow(Callback):
    """Logs routing flips, logit errors and loss error against fp32, in total and by region.

    Costs two forward passes of the slice, and one more per narrow region, on sampled steps. Changes no gradient, weight
    or random state.

    Args:
        every_n_steps: optimiser steps between samples, the first step included; null takes trainer.log_every_n_steps.
        num_samples: samples of the batch that run again.
        by_region: also measure each narrow region.

    Raises:
        UserError: fewer than 1 step or sample.
    """

    def __init__(self, every_n_steps: int | None = None, num_samples: int = 8, by_region: bool = True) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_samples", num_samples)):
            if value is not None and value < 1:
                raise UserError(f"{name} of PrecisionShadow is {value}: choose 1 or more")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.by_region = by_region

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Before a sampled step, with its weights: run the slice in all ways and log the differences."""
        assert isinstance(pl_module, VisionLanguageModule)
        micro_step, step = pl_module.micro_step(batch_idx), trainer.global_step + 1
        every = self.every_n_steps or log_interval(trainer)
        if (step != 1 and step % every) or micro_step % trainer.accumulate_grad_batches:
            return
        rerun = _Rerun(pl_module, batch.first(self.num_samples), micro_step)
        with trainer.precision_plugin.train_step_context():
            trained = rerun.as_trained()
        shadow = rerun.in_fp32(float32_everywhere())
        values = _shift_by_layer(trained, shadow)
        values[metric_keys.SHADOW_LOSS_ERROR.key()] = _loss_error(trained, shadow)
        if self.by_region:
            for name, policy in narrow_regions(pl_module.precision, str(trainer.precision)).items():
                values |= _shift_of_region(name, rerun.in_fp32(policy), shadow)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)


def narrow_regions(policy: PrecisionPolicy, precision: str) -> dict[Region, PrecisionPolicy]:
    """Return, for each narrow region, the policy in which only it is as trained; precision: the Trainer's."""
    policies: dict[Region, PrecisionPolicy] = {}
    for name in REGIONS:
        dtype = policy.dtype_of(name) or TRAINER_DTYPE.get(precision, "float32")
        if dtype != "float32" and name != "optimizer_state":
            alone = PrecisionPolicy(**{**vars(float32_everywhere()), "simulate": policy.simulate, name: dtype})
            policies[name] = alone
    return policies


class _Whole(nn.Module):
    """Backbone and objective as one module, so one call widens their weights."""

    def __init__(self, backbone: Backbone, objective: Objective) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = objective

    def forward(self, batch: Batch, draws: Draws) -> ObjectiveOutput:
        output: ObjectiveOutput = self.objective(self.backbone, batch, draws)
        return output


class _Rerun:
    """Runs one slice again with the same masks and noise."""

    def __init__(self, module: VisionLanguageModule, batch: Batch, step: int) -> None:
        self.module = module
        self.batch = batch
        self.step = step

    def as_trained(self) -> ObjectiveOutput:
        """Run in the precision of training."""
        with self._repeatable(), torch.no_grad():
            output: ObjectiveOutput = self.module.objective(
                self.module.backbone, self.batch, self.module.draws("train", self.module.global_step)
            )
            return output

    def in_fp32(self, policy: PrecisionPolicy) -> ObjectiveOutput:
        """Run with weights and buffers widened to fp32, under a policy."""
        whole = _Whole(self.module.backbone, self.module.objective)
        wide = {name: _widen(tensor) for name, tensor in (*whole.named_parameters(), *whole.named_buffers())}
        with self._repeatable(), torch.no_grad(), use_precision(whole, policy):
            output: ObjectiveOutput = functional_call(
                whole, wide, (self.batch, self.module.draws("train", self.module.global_step))
            )
            return output

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        device = self.module.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.module.seed_noise(self.step)
            yield


def _widen(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.is_floating_point() else tensor.clone()


def _shift_by_layer(trained: ObjectiveOutput, shadow: ObjectiveOutput) -> dict[str, float]:
    pairs: dict[tuple[int, Modality], list[tuple[PairPlan, PairPlan]]] = defaultdict(list)
    for named, ours, theirs in _pair(trained, shadow):
        for modality in named.modalities:
            pairs[named.block, modality].append((ours, theirs))
    values: dict[str, float] = {}
    for (block, modality), plans in pairs.items():
        shift = routing_shift([ours for ours, _ in plans], [theirs for _, theirs in plans], modality)
        for field, metric_key in _SHIFTS.items():
            values[metric_key.key(block=block, modality=modality.label)] = float(getattr(shift, field))
    return values


def _shift_of_region(name: Region, output: ObjectiveOutput, shadow: ObjectiveOutput) -> dict[str, float]:
    values = {metric_keys.REGION_LOSS_ERROR.key(region=name): _loss_error(output, shadow)}
    plans = list(_pair(output, shadow))
    if plans:
        shift = routing_shift([ours for _, ours, _ in plans], [theirs for _, _, theirs in plans])
        values[metric_keys.REGION_FLIP_RATE.key(region=name)] = float(shift.flip_rate)
        values[metric_keys.REGION_LOGIT_ERROR.key(region=name)] = float(shift.logit_error_rms)
    return values


def _pair(output: ObjectiveOutput, shadow: ObjectiveOutput) -> Iterator[tuple[NamedPlan, PairPlan, PairPlan]]:
    for named, reference in zip(output.plans, shadow.plans, strict=True):
        assert (named.source, named.layer) == (reference.source, reference.layer)
        if isinstance(named.plan, PairPlan) and isinstance(reference.plan, PairPlan):  # soft slots choose no experts
            yield named, named.plan, reference.plan


def _loss_error(output: ObjectiveOutput, shadow: ObjectiveOutput) -> float:
    return abs(_task_loss(output.terms.values()) - _task_loss(shadow.terms.values()))


def _task_loss(terms: Iterable[Term]) -> float:
    return sum(float(term.weighted) for term in terms)
