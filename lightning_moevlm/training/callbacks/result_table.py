"""Prints the results of `validate`, `test` and `predict`."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.training.callbacks.feature_writer import FeatureWriter
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

WRITE_FEATURES = "--trainer.callbacks+=lightning_moevlm.training.callbacks.FeatureWriter"
"""The option that saves predictions."""


class ResultTable(Callback):
    """Prints a table of metrics after validate and test (not inside fit), and the folder of predictions.

    Raises:
        UserError: a validation or test that measured nothing.
    """

    def __init__(self) -> None:
        self._num_batches = 0  # predicted on this rank

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, unless this is a validation of fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            _refuse_no_result(trainer, pl_module)
            _print_table(trainer, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        _refuse_no_result(trainer, pl_module)
        _print_table(trainer, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the count."""
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
        """Print the number of files and their folder."""
        batches = torch.tensor(self._num_batches, device=pl_module.device)
        num_files = int(trainer.strategy.reduce(batches, reduce_op="sum"))  # a file per batch; a collective call
        for writer in prediction_writers(trainer):
            if isinstance(writer, FeatureWriter):
                _print(f"{num_files} {'file' if num_files == 1 else 'files'} with features: {writer.folder.absolute()}")


def result_table(metrics: Mapping[str, float], title: str) -> Table:
    """Return a table of metrics, sorted by key, with units and meanings from their declarations."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("meaning")
    for key in sorted(metrics):
        known = metric_keys.find_metric(key)
        value = metrics[key]
        text = f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"
        table.add_row(key, text, known.unit if known else "", known.title if known else "")
    return table


def prediction_writers(trainer: Trainer) -> list[BasePredictionWriter]:
    """Return the callbacks that save predictions."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets, but declares it not
    return [callback for callback in callbacks if isinstance(callback, BasePredictionWriter)]


def _refuse_no_result(trainer: Trainer, pl_module: LightningModule) -> None:
    if not trainer.callback_metrics and isinstance(pl_module, VisionLanguageModule):
        raise UserError(
            f"nothing was measured: model.objective {type(pl_module.objective).__name__} can use no sample of this "
            "data, and no callback judges it; choose data of its kind (data.root, data.annotation), or add a task "
            "such as -c conf/tasks/linear_probe.yaml"
        )


@rank_zero_only
def _print_table(trainer: Trainer, title: str) -> None:
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    if metrics:
        Console().print(result_table(metrics, title))


@rank_zero_only
def _print(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False, markup=False)
