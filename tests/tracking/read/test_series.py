import math
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from lightning_moevlm.tracking.read.runs import find_runs, tags_of_runs
from lightning_moevlm.tracking.read.series import metric_series
from lightning_moevlm.tracking.read.sqlite_rows import are_most_points
from lightning_moevlm.tracking.store import sqlite_path


@pytest.mark.parametrize("others", [0, 4])
def test_series_are_what_was_logged(uri: str, others: int) -> None:
    """As MLflow's own client tells it, but for NaN and infinities, which it tells as 0 and the largest float."""
    client = MlflowClient(uri)
    run_id, silent = (client.create_run("0").info.run_id for _ in range(2))
    metrics = [
        Metric("loss", 3.0, 1000, 2),
        Metric("loss", 4.0, 1000, 1),
        Metric("loss", 5.0, 2000, 2),  # a resumed run logs the step again: the later point counts
        Metric("loss", math.nan, 3000, 3),
        Metric("grad_norm", math.inf, 1000, 1),
        Metric("grad_norm", -math.inf, 1000, 2),
        Metric("grad_norm", -1e300, 1000, 10),
    ]
    client.log_batch(run_id, metrics=metrics)
    for _ in range(others):
        client.log_batch(
            client.create_run("0").info.run_id, metrics=[Metric("loss", 9.0, 1000, step) for step in range(8)]
        )
    path = sqlite_path(uri)
    assert path is not None
    assert are_most_points(path, [run_id, silent]) == (others == 0)
    found = metric_series(uri, [run_id, silent])
    assert found[silent] == {}
    assert list(found[run_id]) == ["grad_norm", "loss"]
    assert found[run_id]["grad_norm"] == ((1, 2, 10), (math.inf, -math.inf, -1e300))
    steps, values = found[run_id]["loss"]
    assert steps == (1, 2, 3)
    assert values[:2] == (4.0, 5.0)
    assert math.isnan(values[2])


def test_tags_are_those_of_the_runs_that_are_found(uri: str) -> None:
    client = MlflowClient(uri)
    study, other = (client.create_experiment(name) for name in ("study 'a'", "other"))
    ids = [
        client.create_run(experiment, tags=tags, run_name="ä").info.run_id
        for experiment, tags in (
            (study, {"role": "arm", "arm": "say \"z\" or 'y'"}),
            (study, {"role": "summary"}),
            (study, {"role": "arm", "deleted": "soon"}),
            (other, {"role": "arm"}),
        )
    ]
    client.delete_run(ids[2])
    for wanted in ({"role": "arm"}, {"role": "arm", "arm": "say \"z\" or 'y'"}, {"role": "ARM"}, {}):
        expected = {run.run_id: run.tags for run in find_runs(uri, "study 'a'", wanted)}
        assert tags_of_runs(uri, "study 'a'", wanted) == expected
    assert list(tags_of_runs(uri, "study 'a'", {"role": "arm"})) == ids[:1]
    assert tags_of_runs(uri, "unknown", {}) == {}


def test_asking_creates_nothing(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert metric_series(uri, ["f00"]) == {"f00": {}}
    assert tags_of_runs(uri, "study", {}) == {}
    assert list(tmp_path.iterdir()) == []
