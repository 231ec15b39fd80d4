"""Decides when metrics are computed: every `trainer.log_every_n_steps` optimiser steps, and after the first."""

from lightning.pytorch import Trainer


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Return whether the step with this number, from 1, is measured."""
    return step == 1 or step % log_interval(trainer) == 0


def log_interval(trainer: Trainer) -> int:
    """Return `trainer.log_every_n_steps`, which Lightning sets but does not declare."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return interval
