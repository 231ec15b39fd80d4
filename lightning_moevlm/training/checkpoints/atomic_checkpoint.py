"""Writes a checkpoint beside the old one and renames it, so that one of the two is always whole; reads exports too.

Lightning writes into the folder for temporary files and moves the file. If that is another disk, as often on clusters,
moving copies onto the old file: a full disk or a killed process leaves a partial checkpoint and nothing to resume.
"""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.contracts.exported_model import is_exported
from lightning_moevlm.training.checkpoints.checkpoint_file import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint input and output, with atomic writes of local files; reads exported models."""

    @override
    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint, or the folder of an exported model."""
        if "://" not in str(path) and is_exported(Path(path)):
            return dict(read_checkpoint(Path(path)))
        return super().load_checkpoint(path, *args, **options)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to PATH.part and rename; on failure the part is removed.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        whole = Path(path)
        part = whole.with_name(f"{whole.name}.part")
        held = BytesIO()  # torch hides the file system's message behind an error of its own
        torch.save(checkpoint, held)
        with explain_write_errors(whole, f"free disk space; an earlier {whole.name} is unchanged"):
            whole.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as stream:
                    stream.write(held.getbuffer())
                    stream.flush()
                    os.fsync(stream.fileno())
                part.replace(whole)
            finally:
                part.unlink(missing_ok=True)


def save_atomically(trainer: Trainer) -> None:
    """Read and write a trainer's checkpoints as above, unless a plugin or strategy has its own way."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
