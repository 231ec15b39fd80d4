"""Combinations of trainer, optimiser and gradient stabilisers that would compute something else than they say."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from lightning_moevlm.errors import UserError

SHARDING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
"""Strategies whose ranks hold parts of a gradient."""


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
