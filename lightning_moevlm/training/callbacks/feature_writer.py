"""Writes the features of `moevlm predict` with the samples' keys."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save_file
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.layers import batch_dependence


class FeatureWriter(BasePredictionWriter):
    """Writes the features of `moevlm predict` as safetensors, one file per batch.

    `features-RRRR-BBBBBB.safetensors` (rank, batch) holds tensors (B, D) and the metadata `keys`, one a line. Files
    of an earlier prediction are removed first. If features depend on the batch, the metadata `depends_on_batch` says
    why.

    Args:
        folder: target folder; created if missing.

    Raises:
        UserError: an empty name of the folder.
    """

    def __init__(self, folder: str = "runs/features") -> None:
        if not folder.strip():
            raise UserError(
                f"folder of FeatureWriter is {folder!r}: name one, such as runs/features, or . for the current one"
            )
        super().__init__(write_interval="batch")
        self.folder = Path(folder)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove files of an earlier prediction, before any rank writes."""
        if trainer.is_global_zero:
            for file in self.folder.glob(f"features-{'[0-9]' * 4}-{'[0-9]' * 6}.safetensors"):
                file.unlink()
        trainer.strategy.barrier("earlier features are removed")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: dict[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: features.detach().to("cpu", torch.float32).contiguous() for name, features in prediction.items()
        }
        target = self.folder / f"features-{trainer.global_rank:04d}-{batch_idx:06d}.safetensors"
        metadata = {"keys": "\n".join(batch.keys)}
        causes = batch_dependence(pl_module)
        if causes:
            metadata["depends_on_batch"] = "\n".join(causes)
        save_file(tensors, target, metadata=metadata)
