"""Cure studies whose results are given: no run is trained."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric

from lightning_moevlm.study.compare.collect_results import to_result
from lightning_moevlm.study.compare.results import RunResult
from lightning_moevlm.study.matrix.collect_row import collect_row
from lightning_moevlm.study.matrix.records import Row
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.ledger import RunState, Status, read_ledger, write_state
from lightning_moevlm.study.run.mlflow_runs import open_experiment
from lightning_moevlm.tracking.read.series import Series
from tests.study.tiny_study import plan_of, write_project

UNTRAINED = 9.0
Final = Callable[[str, int], float | None]
"""Of arm and seed: the final loss; infinite for a divergence, None for a run that is missing."""


def write_cures(folder: Path, name: str, cures: tuple[str, ...], uri: str = "sqlite://", **study: Any) -> Path:
    """Write a cure study and its illness; `design` holds further options of the design."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "illness").mkdir(exist_ok=True)
    (folder / "illness" / f"{name}.yaml").write_text(f"model: {{{name}: true}}\n")
    options = {"illness": [f"illness/{name}.yaml"], **study.pop("design", {})}
    declared = {
        "arms": None,
        "factors": {cure: {"on": {f"model.{cure}": 1}} for cure in cures},
        "design": {"cures": options},
        "seeds": [0, 1, 2],
        "question": f"What cures {name}?",
        "base": ["illness/base.yaml"],
        **study,
    }
    file = write_project(folder, uri, declared)
    text = {key: value for key, value in yaml.safe_load(file.read_text()).items() if value is not None}
    file.unlink()
    (folder / "base.yaml").replace(folder / "illness" / "base.yaml")
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(text, sort_keys=False))
    return file


def results_of(
    plan: Plan, final: Final, series: Callable[[PlannedRun], dict[str, Series]] | None = None
) -> list[RunResult]:
    """Return a result per planned run."""
    results = []
    for run in plan.runs:
        value = final(run.arm, run.seed)
        if value is None:
            results.append(to_result(run, RunState(Status.PLANNED), {}))
            continue
        diverged = value == float("inf")
        steps, values = (0, 4), (UNTRAINED, UNTRAINED + 5 if diverged else value)
        own = {"val/task_loss": Series(steps, values), "throughput/samples_per_second": Series((1, 2, 3), (100.0,) * 3)}
        state = RunState(Status.DIVERGED if diverged else Status.FINISHED, run.digest)
        results.append(to_result(run, state, own | (series(run) if series else {})))
    return results


def row_of(file: Path, final: Final, series: Callable[[PlannedRun], dict[str, Series]] | None = None) -> Row:
    """Return the unjudged row of a study file with given results."""
    plan = plan_of(file)
    return collect_row(plan.comparison, results_of(plan, final, series))


def loss_by_share(damage: float = 3.0, **shares: float) -> Final:
    """Return losses of a cure study by the share that each arm undoes: healthy 3, sick 3 + damage; small noise by seed.

    shares: by arm without `sick__`; `healthy__x` gives an offset from the healthy model instead.
    """

    def final(arm: str, seed: int) -> float:
        noise = 0.01 * math.sin(5 * seed + sum(map(ord, arm)))
        if arm.startswith("healthy"):
            return 3.0 + 0.1 * seed + shares.get(arm, 0.0) + (noise if "__" in arm else 0.0)
        share = shares.get(arm.removeprefix("sick").removeprefix("__"), 0.0)
        return 3.0 + 0.1 * seed + damage * (1 - share) + noise

    return final


def fill_store(plan: Plan, uri: str, final: Final) -> int:
    """Write runs with given results to MLflow and the ledger, for those that have none; return their number."""
    experiment, client, filled = open_experiment(uri, plan.comparison.name), MlflowClient(uri), 0
    for run, state in read_ledger(plan):
        value = final(run.arm, run.seed)
        if state.status is not Status.PLANNED or value is None:
            continue
        run_id = experiment.create(run)
        points = [
            Metric(key, number, 1_700_000_000_000 + step, step)
            for key, step, number in (
                ("val/task_loss", 0, UNTRAINED),
                ("val/task_loss", 4, value),
                ("train/task_loss", 4, value),
            )
        ]
        client.log_batch(run_id, metrics=points)
        experiment.close(run_id, "finished", finished=True)
        write_state(plan.run_folder(run), RunState(Status.FINISHED, run_id, started=0.0, ended=60.0))
        filled += 1
    return filled
