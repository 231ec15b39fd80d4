"""Evaluation capacity is an option of its own: swept on a checkpoint without training, and recorded."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_moevlm.training.callbacks import telemetry
from tests.small_run import BACKBONE, SMALL, budget

CAPACITY = f"{BACKBONE}.moe.init_args.capacity"
Moevlm = Callable[..., str]


def logged(workplace: Path, table: str, pattern: str) -> list[tuple[str, str]]:
    with sqlite3.connect(workplace / "runs/mlflow.db") as store:
        found = store.execute(f"SELECT key, value FROM {table} WHERE key LIKE ? ORDER BY rowid", (pattern,))
        return list(found.fetchall())


@pytest.mark.slow
def test_evaluation_capacity_is_swept_on_one_checkpoint(moevlm: Moevlm, workplace: Path) -> None:
    moevlm("fit", *SMALL, *budget(2))
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    losses = {}
    for factor in ("0.1", "0.5", "4.0", "null", "{image: 0.1, text: 4.0}"):
        moevlm("validate", *SMALL, "--ckpt_path", str(checkpoint), f"{CAPACITY}.eval_factor={factor}")
        losses[factor] = float(logged(workplace, "metrics", "val/task_loss")[-1][1])
    # 4 experts and top-1: a factor of 4 drops nothing, whoever goes where
    assert losses["4.0"] == losses["null"]
    assert len({losses[factor] for factor in ("0.1", "0.5", "4.0", "{image: 0.1, text: 4.0}")}) > 1


def test_real_capacity_and_dispatch_path_are_on_the_record(
    moevlm: Moevlm, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "measure_products_once", lambda measure: {"float32": 0.31, "bfloat16": 1.1})
    # images of 32 px in 8 px patches: 16 per sample, 8 samples, 128 pairs per pass, 4 experts, factor 1.25: 40 places;
    # in multiples of 64: 64 places, 64 * 4 / 128 = 2.0
    moevlm("fit", *SMALL, *budget(1), f"{CAPACITY}.multiple_of=64")
    factors = dict(logged(workplace, "latest_metrics", "capacity/%/image"))
    assert factors and all(float(value) == 2.0 for value in factors.values())
    tags = dict(logged(workplace, "tags", "dispatch/%"))
    assert len(tags) == 2  # an image and a text MoE in one sparse block
    assert all("Dispatcher for 4 experts 16 x 32" in text for text in tags.values())
    assert all("table measured_cpu.json, row " in text for text in tags.values())
    assert logged(workplace, "tags", "cpu/products") == [("cpu/products", "float32 0.31 TFLOP/s, bfloat16 1.1 TFLOP/s")]
