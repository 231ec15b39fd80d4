"""Finds the newest checkpoint from before a step."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.checkpoints.checkpoint_file import inspect_checkpoint


class FoundCheckpoint(NamedTuple):
    """A checkpoint that training can resume from."""

    path: Path
    step: int
    """Optimiser steps done."""


def find_checkpoint_before(step: int, places: Sequence[Path]) -> FoundCheckpoint | None:
    """Return the checkpoint with the most steps before a step; None without one.

    Args:
        step: optimiser step, from 1.
        places: files, and folders of files.
    """
    earlier = [each for each in find_checkpoints(places) if each.step < step]
    return max(earlier, key=lambda each: each.step, default=None)


def find_checkpoints(places: Sequence[Path]) -> list[FoundCheckpoint]:
    """Return the checkpoints in files and folders of files that training can resume from; others are left out."""
    files = [file for place in places for file in (sorted(place.glob("*.ckpt")) if place.is_dir() else [place])]
    found = ((file, _read_step(file)) for file in dict.fromkeys(files))
    return [FoundCheckpoint(file, step) for file, step in found if step is not None]


def _read_step(file: Path) -> int | None:
    """Return the steps of a checkpoint; None if it is not whole, or has weights alone."""
    try:
        checkpoint = inspect_checkpoint(str(file), "fit", file.parent)
    except UserError:
        return None
    return None if checkpoint is None else int(checkpoint["global_step"])
