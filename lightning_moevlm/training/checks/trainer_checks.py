"""Refuses combinations of parts that would fail later, or compute something other than their options say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_moevlm.common.atomic_files import check_writable
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.read.whole_steps import refuse_smaller_step
from lightning_moevlm.model.backbones import BackboneSpec
from lightning_moevlm.model.objectives import Objective

SHARDING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
"""Strategies whose ranks hold parts of a gradient."""


def refuse_other_sources(trainer: Trainer, objective: Objective) -> None:
    """Refuse data that lack a source on which a part of the objective trains."""
    data: object = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets, but declares it not
    if isinstance(data, ShardDataModule):
        objective.check_sources(data.sources)


def refuse_unsuited_trainer(trainer: Trainer) -> None:
    """Refuse a trainer that also clips, or whose ranks hold parts of the gradient."""
    if trainer.gradient_clip_val is not None:
        raise UserError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val} and model.gradient is set: clip in one place; "
            "use model.gradient.clip_norm and set trainer.gradient_clip_val to null"
        )
    if isinstance(trainer.strategy, SHARDING):
        raise UserError(
            f"model.gradient is set and {type(trainer.strategy).__name__} shards gradients over ranks: no rank has the "
            "whole norm; choose the strategy ddp, or set every field of model.gradient to null"
        )


def refuse_invalid_trainer(trainer: Trainer) -> None:
    """Refuse options that Lightning accepts but that divide by 0, train nothing or have no effect."""
    check_number("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, least=1)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        if isinstance(callback, StochasticWeightAveraging) and trainer.max_epochs == -1:
            raise UserError(
                "StochasticWeightAveraging counts epochs, and trainer.max_epochs is -1: set trainer.max_epochs to a "
                "number, trainer.max_steps to -1, and swa_epoch_start to the first epoch of averaging"
            )
        if isinstance(callback, LearningRateFinder):
            raise UserError(
                "LearningRateFinder sets an attribute of the model, but the rate here is an option of model.optimizer: "
                "remove the callback; a study with design: lr_sensitivity finds the rate"
            )
    if trainer.checkpoint_callbacks and not trainer.loggers and "://" not in trainer.default_root_dir:
        check_writable(Path(trainer.default_root_dir), "trainer.default_root_dir")  # where checkpoints go


def refuse_other_sizes(spec: BackboneSpec, data: Mapping[str, Any]) -> None:
    """Refuse data whose sizes do not fit the model.

    Args:
        spec: of the backbone.
        data: options of the data module, by name.
    """
    for name, fits in (
        ("image_size", data["image_size"] == spec.image_size),
        ("vocab_size", data["vocab_size"] <= spec.vocab_size),
        ("max_text_len", data["max_text_len"] <= spec.max_text_len),
    ):
        if not fits:
            raise UserError(
                f"data.{name} is {data[name]}, but the model is built for {getattr(spec, name)}: set "
                f"model.backbone.init_args.{name} to {data[name]}, or data.{name} to {getattr(spec, name)}"
            )


def refuse_uneven_steps(trainer: Trainer) -> None:
    """Refuse a number of training batches that would make the last step of an epoch smaller, for any loader."""
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        overfit = trainer.overfit_batches  # type: ignore[attr-defined]
        option = f"trainer.overfit_batches {overfit}" if overfit else "the loader of training data"
        refuse_smaller_step(trainer.num_training_batches, trainer.accumulate_grad_batches, option)


def refuse_other_precision(asked: object, trainer: Trainer) -> None:
    """Refuse 16-mixed on CPUs, where Lightning would silently compute in bf16-mixed."""
    if asked in ("16-mixed", "16", 16) and trainer.precision != "16-mixed":
        raise UserError(
            f"trainer.precision is {asked}, which CPUs do not support; Lightning would compute in {trainer.precision}: "
            "choose that, or round to float16 with model.precision and its option simulate"
        )
