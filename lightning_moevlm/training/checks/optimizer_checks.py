"""Refuses optimisers and schedules that the training module cannot run."""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_moevlm.common.errors import UserError


def refuse_unsuited_optimizer(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse an optimiser that unscales gradients itself, after they were clipped."""
    scales = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scales and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise UserError(
            f"{type(optimizer).__name__} is fused and trainer.precision is 16-mixed: gradients would be clipped while "
            "scaled; set fused to false, choose bf16-mixed, or set every field of model.gradient to null"
        )


def refuse_invalid_options(optimizer: Optimizer) -> None:
    """Refuse options that torch accepts but cannot train with: infinite numbers, eps 0, and SparseAdam."""
    if isinstance(optimizer, SparseAdam):
        raise UserError(
            "model.optimizer SparseAdam needs sparse gradients, and all gradients here are dense: choose AdamW"
        )
    for name, value in optimizer.defaults.items():
        for number in value if isinstance(value, Sequence) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"model.optimizer cannot train with {name} {value}: choose finite numbers")
    if optimizer.defaults.get("eps") == 0:
        raise UserError(
            "model.optimizer cannot train with eps 0: a weight without a gradient, such as the embedding of an unused "
            "word, becomes 0 / 0; choose a value above 0, such as 1e-8"
        )


def refuse_vanishing_eps(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse an eps that rounds to 0 in the dtype of the weights, in which torch's optimisers add it."""
    eps = optimizer.defaults.get("eps")
    if trainer.precision == "16-true" and isinstance(eps, float) and not torch.tensor(eps).half():
        raise UserError(
            f"model.optimizer has eps {eps:g}, which is 0 in float16: a weight without a gradient becomes 0 / 0 under "
            "trainer.precision 16-true; set it to 1e-4, or choose 16-mixed or bf16-true"
        )


def refuse_unsuited_schedule(schedule: LRScheduler) -> None:
    """Refuse a schedule that waits for a metric; schedules are stepped after each optimiser step."""
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError(
            "model.schedule ReduceLROnPlateau follows a metric, and schedules here follow optimiser steps: choose one "
            "of `moevlm list schedules`"
        )


FAILURES = (ArithmeticError, LookupError, TypeError, ValueError)
"""Exceptions of torch's optimisers and schedules for invalid options."""
