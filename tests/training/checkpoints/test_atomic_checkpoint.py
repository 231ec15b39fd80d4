"""A checkpoint is there whole, or the one before it is."""

import resource
import tempfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.checkpoints.atomic_checkpoint import AtomicCheckpointIO, save_atomically


def test_a_checkpoint_does_not_pass_through_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning writes into the folder for temporary files, and copies from there where that is another disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    save_atomically(trainer)
    trainer.strategy.checkpoint_io.save_checkpoint({"step": 1}, tmp_path / "new/last.ckpt")
    assert torch.load(tmp_path / "new/last.ckpt", weights_only=True) == {"step": 1}


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    last, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, last)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"last\.ckpt could not be written .*; free disk space"):
            io.save_checkpoint({"step": 2, "weights": torch.zeros(1_000_000)}, last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(last, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [last]
