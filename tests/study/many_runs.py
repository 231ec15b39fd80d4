"""A study of many runs that nobody trained: the ledger says that all have ended, and points lie in MLflow's tables.

Points are written by SQL, in the order of the table's index: MLflow's client would take an hour. Run as a program it
writes the report, so that time and memory are the report's own: python -m tests.study.many_runs FOLDER
"""

import json
import resource
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lightning_moevlm.common.flat_config import flatten
from lightning_moevlm.study.compare.collect_results import collect_results
from lightning_moevlm.study.plan.planned_run import Plan, tracker_tags
from lightning_moevlm.study.report.make_report import describe_origin, make_report
from lightning_moevlm.study.report.mlflow_summary import log_summary
from lightning_moevlm.study.report.tables.report_tables import report_tables
from lightning_moevlm.study.report.terminal import print_tables
from lightning_moevlm.study.report.write_report import write_report
from lightning_moevlm.study.run.ledger import RunState, Status, read_ledger, write_state
from lightning_moevlm.study.run.mlflow_runs import OUTCOME, ROLE, ROLE_ARM, open_experiment
from lightning_moevlm.tracking.store import sqlite_path
from tests.study.tiny_study import plan_of, write_project

START_MS = 1_700_000_000_000
_BLOCKS, _MODALITIES, _EXPERTS = (1, 3), ("image", "text"), 8
_LAYERS = [f"block{block}/{modality}" for block in _BLOCKS for modality in _MODALITIES]
_OF_LAYERS = ("load_entropy", "token_entropy", "max_violation", "drop_rate", "dead_experts")
_SCALARS = ("train/total_loss", "optim/learning_rate", "throughput/tokens_per_second", "val/majority_text")


def plan_many(folder: Path, num_arms: int, num_seeds: int) -> Plan:
    """Plan a study of so many arms, the baseline among them; configurations are merged by OmegaConf."""
    arms: dict[str, Any] = {f"skew_{i}": {"model.skew": 1.0 + 0.01 * i} for i in range(num_arms - 1)}
    study = {"arms": {"baseline": None, **arms}, "seeds": list(range(num_seeds)), "decide": {"correction": "holm"}}
    return plan_of(write_project(folder, f"sqlite:///{folder / 'mlflow.db'}", study))


def report(folder: Path) -> None:
    """Do what `moevlm sweep report` does once the runs are planned, and print seconds, CPU seconds and peak bytes."""
    plan = plan_of(folder / "tiny.yaml")
    began, cpu = time.perf_counter(), time.process_time()
    experiment = open_experiment(f"sqlite:///{folder / 'mlflow.db'}", plan.comparison.name)
    result = collect_results(plan, read_ledger(plan), experiment.uri)
    whole = make_report(describe_origin(plan, result), result)
    page = write_report(whole, folder / "report")
    log_summary(experiment, whole, folder / "report")
    print_tables(Console(file=sys.stderr), report_tables(result))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    told = [time.perf_counter() - began, time.process_time() - cpu, peak, page.stat().st_size]
    print(json.dumps(told))


def fill(plan: Plan, uri: str, num_points: int) -> int:
    """Make every run of a plan look as if it had ended; return the number of keys of each."""
    experiment = open_experiment(uri, plan.comparison.name)
    path = sqlite_path(uri)
    assert path is not None
    ids = [f"{i:032x}" for i in range(1, len(plan.runs) + 1)]
    steps = np.linspace(5, 500, num_points).astype(int).tolist()
    series = _series(len(plan.runs), num_points)
    with sqlite3.connect(path) as store:
        store.execute("PRAGMA synchronous = OFF")
        for run, run_id in zip(plan.runs, ids, strict=True):
            artifacts = f"{path.parent.as_uri()}/artifacts/{run_id}"
            row = (run_id, run.name, experiment.experiment_id, START_MS, START_MS + 60_000, artifacts)
            store.execute(
                "INSERT INTO runs (run_uuid, name, experiment_id, start_time, end_time, artifact_uri, status, "
                "lifecycle_stage, source_type, user_id) VALUES (?, ?, ?, ?, ?, ?, 'FINISHED', 'active', 'LOCAL', 'x')",
                row,
            )
            tags = {**tracker_tags(run), ROLE: ROLE_ARM, OUTCOME: "finished", "mlflow.runName": run.name}
            store.executemany("INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)", [
                (key, value, run_id) for key, value in flatten(run.resolved).items()
            ])  # fmt: skip
            store.executemany("INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)", [
                (key, value, run_id) for key, value in tags.items()
            ])  # fmt: skip
        for key in sorted(series):
            store.executemany(
                "INSERT INTO metrics (key, value, is_nan, timestamp, run_uuid, step) VALUES (?, ?, 0, ?, ?, ?)",
                _rows(key, series[key], ids, steps),
            )
            store.executemany(
                "INSERT INTO latest_metrics (key, value, is_nan, timestamp, run_uuid, step) VALUES (?, ?, 0, ?, ?, ?)",
                list(_rows(key, series[key], ids, steps))[-len(ids) :],
            )
    for run, run_id in zip(plan.runs, ids, strict=True):
        write_state(plan.run_folder(run), RunState(Status.FINISHED, run_id, started=0.0, ended=60.0 + run.seed))
    return len(series)


def _rows(key: str, values_RS: np.ndarray, ids: list[str], steps: list[int]) -> Iterator[tuple[Any, ...]]:
    for column, step in enumerate(steps):
        values = values_RS[:, column].tolist()
        for run_id, value in zip(ids, values, strict=True):
            yield key, value, START_MS + 100 * step, run_id, step


def _series(num_runs: int, num_points: int) -> dict[str, np.ndarray]:
    """Return values, runs x points, by key: a loss that falls and sometimes spikes, loads, and noise."""
    random = np.random.default_rng(0)
    time = np.linspace(0, 1, num_points)
    shape = (num_runs, num_points)
    own = random.normal(0, 0.05, (num_runs, 1))
    loss = 4 + 4 * np.exp(-5 * time) + own + random.normal(0, 0.01, shape)
    spiky = np.where(random.random(shape) < 0.002, 3.0, 0.0)
    series = {
        "train/task_loss": loss + spiky,
        "val/task_loss": loss,
        "val/accuracy_text": 0.4 - 0.3 * np.exp(-5 * time) + random.normal(0, 0.01, shape),
        "optim/grad_norm": 1 + random.random(shape) + 10 * spiky,
        "optim/update_norm": 0.1 + 0.01 * random.random(shape),
        "throughput/samples_per_second": 200 + random.normal(0, 5, shape),
        "memory/peak_process": 900 + random.normal(0, 5, shape),
    }
    for layer in _LAYERS:
        weights = np.exp(random.normal(0, 1, (num_runs, 1, _EXPERTS)) * time[None, :, None])
        shares = weights / weights.sum(axis=2, keepdims=True)
        series |= {f"load/{layer}/expert{e}": shares[:, :, e] for e in range(_EXPERTS)}
        series |= {f"{name}/{layer}": random.random(shape) for name in _OF_LAYERS}
    series |= {name: random.random(shape) for name in _SCALARS}
    return series


if __name__ == "__main__":
    report(Path(sys.argv[1]))
