"""A model that learns one number and writes down which samples it is given."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_moevlm.contracts.batch import Batch


class Recorder(LightningModule):
    """seen, validated: the keys of every batch. log: a file that gets a line per training step, at once."""

    def __init__(self, estimate_steps: bool = False, log: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.estimate_steps = estimate_steps
        self.log_file = log
        self.seen: list[tuple[str, ...]] = []
        self.validated: list[tuple[str, ...]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, Batch) and isinstance(batch.keys, tuple)
        assert batch.images_BRYX is not None and batch.images_BRYX.device == self.device
        self.seen.append(batch.keys)
        if self.log_file is not None:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(f"{self.global_step + 1} {' '.join(batch.keys)}\n")
        return (self.weight - batch.images_BRYX.float().mean() / 255) ** 2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch.keys)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.estimate_steps:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seer(Recorder):
    """Writes down the pixels of every training batch, too: pixels holds a hash of each."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels: list[str] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert batch.images_BRYX is not None
        self.pixels.append(hashlib.sha256(batch.images_BRYX.contiguous().numpy().tobytes()).hexdigest())
        return super().training_step(batch, batch_idx)


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    """A Trainer on the CPU that says nothing."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **options,
    )
