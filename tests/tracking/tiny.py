"""The smallest module that trains: one weight, one loss, logged each step; and the points that a store then has."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_moevlm.tracking import metric_history


class TinyModule(pl.LightningModule):
    """fail_at: raise `failure` in this step. poison_at: log NaN and infinity in this step."""

    def __init__(
        self,
        scale: float = 1.0,
        fail_at: int | None = None,
        failure: BaseException | None = None,
        poison_at: int = -1,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(scale))
        self._fail_at, self._failure, self._poison_at = fail_at, failure, poison_at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self._fail_at == self.global_step:
            raise self._failure or RuntimeError("the step failed")
        loss = (self.weight * batch[0]).square().mean()
        values = {"train/task_loss": loss.item(), "recall@1": float(self.global_step)}
        if self.global_step == self._poison_at:
            values |= {"train/nan": float("nan"), "train/inf": float("inf"), "train/minus": float("-inf")}
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@dataclass(frozen=True)
class TinyManifest:
    name: str = "tiny-set"


class TinyData(pl.LightningDataModule):
    """Eight ones per batch, without end enough for every test."""

    manifest = TinyManifest()
    manifest_digest = "5f" * 32

    def __init__(self, api_key: str | None = None, num_samples: int = 64) -> None:
        super().__init__()
        self._num_samples = num_samples

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.ones(self._num_samples, 1)), batch_size=1)


@contextmanager
def short_files(most_bytes: int) -> Iterator[None]:
    """Have the system refuse writes of this process beyond so many bytes of a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tiny_trainer(
    logger: Logger | bool, directory: Path, max_steps: int = 3, callbacks: list[pl.Callback] | None = None
) -> pl.Trainer:
    return pl.Trainer(
        logger=logger,
        max_steps=max_steps,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def values(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in metric_history(uri, run_id, [key])]
