"""What `validate`, `test` and `predict` have to say at their end, on the terminal."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.training.callbacks.feature_writer import FeatureWriter

WRITE_FEATURES = "--trainer.callbacks+=lightning_moevlm.training.callbacks.FeatureWriter"
"""What keeps predictions, in a command line."""


class ResultTable(Callback):
    """Prints a table of metrics after validate and test (not inside fit), and where the files of predict are."""

    def __init__(self) -> None:
        self._num_batches = 0  # predicted on this rank

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, unless this is a validation of fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            _print_table(trainer, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        _print_table(trainer, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        self._num_batches = 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count."""
        self._num_batches += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many files are where."""
        batches = torch.tensor(self._num_batches, device=pl_module.device)
        num_files = int(trainer.strategy.reduce(batches, reduce_op="sum"))  # a file per batch; every rank is asked
        for writer in prediction_writers(trainer):
            if isinstance(writer, FeatureWriter):
                _say(f"{num_files} {'file' if num_files == 1 else 'files'} with features: {writer.folder.absolute()}")


def result_table(metrics: Mapping[str, float], title: str) -> Table:
    """Return a table of metrics, sorted by key; what a key means and its unit are looked up in its declaration."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("meaning")
    for key in sorted(metrics):
        known = metric_keys.find_metric(key)
        value = metrics[key]
        shown = f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"
        table.add_row(key, shown, known.unit if known else "", known.title if known else "")
    return table


def prediction_writers(trainer: Trainer) -> list[BasePredictionWriter]:
    """Return the callbacks that keep what `predict` computes."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets, but declares it not
    return [callback for callback in callbacks if isinstance(callback, BasePredictionWriter)]


@rank_zero_only
def _print_table(trainer: Trainer, title: str) -> None:
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    if metrics:
        Console().print(result_table(metrics, title))


@rank_zero_only
def _say(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False, markup=False)
