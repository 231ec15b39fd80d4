"""Prints the results of `fit`, `validate`, `test` and `predict`."""

from collections.abc import Mapping
from typing import NamedTuple

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

_WIDTH = 120
"""Columns of the table where no terminal has a width, as in a log file."""


class Validation(NamedTuple):
    """One validation of fit."""

    step: int  # optimiser steps before it
    metrics: Mapping[str, float]


class ResultTable(Callback):
    """Prints a table of metrics at the end of fit, validate and test, and the folder of predictions.

    That of fit has the `val/` metrics of the first and of the last validation. Loss terms and routing are in the log.

    Raises:
        UserError: a validation or test that measured nothing.
    """

    def __init__(self) -> None:
        self._num_batches = 0  # predicted on this rank
        self._first: Validation | None = None
        self._last: Validation | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validations of an earlier fit."""
        self._first = self._last = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table; within fit keep the metrics for its end."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            _refuse_no_result(trainer, pl_module)
            _print_table(result_table(_metrics(trainer), "validate"))
        else:
            self._last = Validation(trainer.global_step, _metrics(trainer))
            self._first = self._first or self._last

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the last validation beside those of the first."""
        if self._first is not None and self._last is not None and self._first.step < self._last.step:
            _print_table(progress_table(self._first, self._last))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        _refuse_no_result(trainer, pl_module)
        _print_table(result_table(_metrics(trainer), "test"))

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
    """Return a table of metrics, sorted by key. What needs no model stands beside the metric that it belongs to."""
    return _table(title, {"value": metrics})


def progress_table(first: Validation, last: Validation) -> Table:
    """Return a table of the last validation's `val/` metrics beside those of the first."""
    columns = {
        f"step {each.step}": {key: value for key, value in each.metrics.items() if _is_result(key)}
        for each in (first, last)
    }
    return _table("validation", columns)


def _is_result(key: str) -> bool:
    known = metric_keys.find_metric(key)
    return key.startswith("val/") and known not in (metric_keys.TOTAL_LOSS, metric_keys.EVAL_DROP_RATE)


def _table(title: str, columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table with a row per key of the last column."""
    last = list(columns.values())[-1]
    beside = {key: trivial for key in last if (trivial := metric_keys.find_trivial(key)) and trivial in last}
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    for name in (*columns, *(["no model"] if beside else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("meaning", no_wrap=True)
    for key in sorted(last.keys() - set(beside.values())):
        values = [_format(metrics.get(key)) for metrics in columns.values()]
        if beside:
            values.append(_format(last.get(beside.get(key, ""))))
        table.add_row(key, *values, _describe(key))
    return table


def _describe(key: str) -> str:
    known = metric_keys.find_metric(key)
    if known is None:
        return ""
    return f"{known.title} ({known.unit})" if known.unit else known.title


def _format(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


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


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@rank_zero_only
def _print_table(table: Table) -> None:
    terminal = Console()
    if table.row_count:
        (terminal if terminal.is_terminal else Console(width=_WIDTH)).print(table)


@rank_zero_only
def _print(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False, markup=False)
