"""Combinations of parts that would fail later, or compute something else than they say."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_moevlm.errors import UserError
from lightning_moevlm.layers import MoEFFN
from lightning_moevlm.losses import AuxiliaryLosses, RoutedLayer
from lightning_moevlm.models import Backbone, BackboneSpec
from lightning_moevlm.objectives import Objective
from lightning_moevlm.optim import parameter_groups
from lightning_moevlm.ranges import check_number
from lightning_moevlm.shards.whole_steps import refuse_smaller_step

SHARDING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
"""Strategies whose ranks hold parts of a gradient."""


def refuse_unsuited_losses(losses: AuxiliaryLosses, backbone: Backbone, objective: Objective) -> None:
    """Refuse losses that this model or objective could not have.

    Raises:
        UserError: with what to change.
    """
    if losses.output_z is not None and not objective.num_classes:
        raise UserError(
            "losses.output_z is on logits of classes, and no term of this objective predicts any: set losses.output_z "
            "to null, or choose image targets that are codes"
        )
    layers = [module for module in backbone.modules() if isinstance(module, MoEFFN)]
    losses.check(
        RoutedLayer(
            router=type(layer.router).__name__,
            num_experts=layer.num_experts,
            adds_noise=layer.router.adds_noise,
            mixes=layer.router.mixes,
            has_rows=layer.router.rows() is not None,
        )
        for layer in layers
    )


def refuse_unsuited_trainer(trainer: Trainer) -> None:
    """Refuse a trainer that clips as well, or whose ranks hold parts of the gradient.

    Raises:
        UserError: with what to change.
    """
    if trainer.gradient_clip_val is not None:
        raise UserError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val} and model.gradient is set too: clip in one "
            "place, model.gradient.clip_norm, and set trainer.gradient_clip_val to null"
        )
    if isinstance(trainer.strategy, SHARDING):
        raise UserError(
            f"model.gradient is set and {type(trainer.strategy).__name__} shards gradients over ranks, so that no rank "
            "sees a whole norm: choose the strategy ddp, or set every field of model.gradient to null"
        )


def refuse_senseless_trainer(trainer: Trainer) -> None:
    """Refuse what Lightning lets pass and what then divides by 0, trains nothing or cannot find what it sets.

    Raises:
        UserError: with what to change.
    """
    check_number("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, least=1)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets, but declares it not
        if isinstance(callback, StochasticWeightAveraging) and trainer.max_epochs == -1:
            raise UserError(
                "StochasticWeightAveraging counts epochs, and trainer.max_epochs is -1: set trainer.max_epochs to a "
                "number, trainer.max_steps to -1, and swa_epoch_start to the epoch that averaging begins with"
            )
        if isinstance(callback, LearningRateFinder):
            raise UserError(
                "LearningRateFinder sets an attribute of the model, and rates here are options of model.optimizer: "
                "leave it out; a study with design: lr_sensitivity finds the rate"
            )


def refuse_other_sizes(spec: BackboneSpec, data: Mapping[str, Any]) -> None:
    """Refuse data that the model has no places for.

    Args:
        spec: of the backbone.
        data: options of the data module, by name.

    Raises:
        UserError: both numbers, and where they are set.
    """
    for name, fits in (
        ("image_size", data["image_size"] == spec.image_size),
        ("vocab_size", data["vocab_size"] <= spec.vocab_size),
        ("max_text_len", data["max_text_len"] <= spec.max_text_len),
    ):
        if not fits:
            raise UserError(
                f"data.{name} is {data[name]}, and the model is made for {getattr(spec, name)}: set "
                f"model.backbone.init_args.{name} to {data[name]}, or data.{name} to {getattr(spec, name)}"
            )


def refuse_uneven_steps(trainer: Trainer) -> None:
    """Refuse training batches, of whatever loader, of which the last step of an epoch would get fewer.

    Raises:
        UserError: with the numbers that divide.
    """
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets, but declares it not
        overfit = trainer.overfit_batches  # type: ignore[attr-defined]
        option = f"trainer.overfit_batches {overfit}" if overfit else "the loader of training data"
        refuse_smaller_step(trainer.num_training_batches, trainer.accumulate_grad_batches, option)


def refuse_other_precision(asked: object, trainer: Trainer) -> None:
    """Refuse 16-mixed where Lightning would compute in bf16-mixed instead, under the name of the other.

    Raises:
        UserError: with what to choose.
    """
    if asked in ("16-mixed", "16", 16) and trainer.precision != "16-mixed":
        raise UserError(
            f"trainer.precision is {asked}, which CPUs do not have, and Lightning would compute in "
            f"{trainer.precision}: choose that, or round to float16 by model.precision and its option simulate"
        )


def refuse_unsuited_optimizer(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse an optimiser that unscales gradients itself, after they were clipped.

    Raises:
        UserError: with what to change.
    """
    scales = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scales and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise UserError(
            f"{type(optimizer).__name__} is fused and trainer.precision 16-mixed scales the loss, so that gradients "
            "would be clipped scaled: set fused to false, choose bf16-mixed, or set every field of model.gradient to "
            "null"
        )


def refuse_senseless_options(optimizer: Optimizer) -> None:
    """Refuse what torch's optimisers let pass: options that are no finite numbers, eps 0, and one for sparse gradients.

    Raises:
        UserError: with the option.
    """
    if isinstance(optimizer, SparseAdam):
        raise UserError(
            "model.optimizer SparseAdam takes sparse gradients alone, and no gradient of these models is: choose AdamW"
        )
    for name, value in optimizer.defaults.items():
        for number in value if isinstance(value, Sequence) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"model.optimizer cannot train with {name} {value}: choose finite numbers")
    if optimizer.defaults.get("eps") == 0:
        raise UserError(
            "model.optimizer cannot train with eps 0: a weight without a gradient, such as the embedding of a word "
            "that no text has, becomes 0 / 0; choose a value above 0, such as 1e-8"
        )


def refuse_vanishing_eps(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse an eps that is 0 in the dtype of the weights, in which torch's optimisers add it.

    Raises:
        UserError: with a value that is not.
    """
    eps = optimizer.defaults.get("eps")
    if trainer.precision == "16-true" and isinstance(eps, float) and not torch.tensor(eps).half():
        raise UserError(
            f"model.optimizer has eps {eps:g}, which is 0 in float16, so that a weight without a gradient becomes "
            "0 / 0 under trainer.precision 16-true: set it to 1e-4, or choose 16-mixed or bf16-true"
        )


def refuse_unsuited_schedule(schedule: LRScheduler) -> None:
    """Refuse a schedule that waits for a metric; schedules are stepped after each optimiser step.

    Raises:
        UserError: with what to choose.
    """
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError(
            "model.schedule ReduceLROnPlateau goes by a metric, and schedules here go by optimiser steps: choose one "
            "of `moevlm list schedules`"
        )


def refuse_other_groups(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse an optimiser's state of other parameter groups than those of this model.

    Raises:
        UserError: with both.
    """
    here = [(group["role"], len(group["params"])) for group in parameter_groups(module.named_parameters())]
    for state in checkpoint.get("optimizer_states", []):
        saved = [(group.get("role"), len(group["params"])) for group in state["param_groups"]]
        if saved != here:
            then, now = (", ".join(f"{role} {count}" for role, count in groups) for groups in (saved, here))
            raise UserError(
                f"the checkpoint cannot be resumed: its optimiser's parameter groups are {then}, those of this model "
                f"{now}; it was saved by an older version or of a model with other parts: resume with the version and "
                "the configuration that saved it, or begin a new run"
            )


def refuse_other_state(checkpoint: Mapping[str, Any], build: Callable[[Iterable[Any]], Optimizer]) -> None:
    """Refuse an optimiser's state that is not what this optimiser remembers, as another kind of optimiser leaves it.

    What it remembers is seen on a step of its own, of a 2 x 2 matrix for each parameter group.

    Args:
        checkpoint: of the same parameter groups.
        build: factory (parameter groups) -> Optimizer.

    Raises:
        UserError: with both.
    """
    for state in checkpoint.get("optimizer_states", []):
        for group in state["param_groups"]:
            saved = next((set(state["state"][index]) for index in group["params"] if index in state["state"]), None)
            weight = nn.Parameter(torch.zeros(1, 2, 2) if group["role"] in ("expert", "shared") else torch.zeros(2, 2))
            weight.grad = torch.ones_like(weight)
            optimizer = build([{"params": [weight], "role": group["role"]}])
            optimizer.step()
            here = set(optimizer.state[weight])
            if saved is not None and saved != here:
                then, now = (", ".join(sorted(names)) or "nothing" for names in (saved, here))
                raise UserError(
                    f"the checkpoint cannot be resumed: its optimiser remembers {then}, and {type(optimizer).__name__} "
                    f"{now}; resume with the optimiser that saved it, or begin a new run"
                )
