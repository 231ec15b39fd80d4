"""A study on a real MLflow server, as its UI shows it: through the REST interface, and in a real browser."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Metric
from rich.console import Console

from lightning_moevlm.study.run.ledger import RunState, Status, write_state
from lightning_moevlm.study.run.mlflow_runs import open_experiment
from lightning_moevlm.study.sweep import answer
from tests.browser import needs_chromium, open_page
from tests.study.tiny_study import plan_of, write_project
from tests.study.tiny_training import points

_FURTHER = {"train/task_loss": 5.0, "optim/grad_norm": 1.0, "max_violation/block1/image": 0.5}


@pytest.fixture
def told(mlflow_server: str, tmp_path: Path) -> str:
    """A study of two arms and two seeds on the server, reported; returns what the report printed."""
    plan = plan_of(write_project(tmp_path, mlflow_server))
    experiment = open_experiment(mlflow_server, plan.comparison.name)
    client = MlflowClient(mlflow_server)
    for run in plan.runs:
        run_id = experiment.create(run)
        values = [(step, points(step, run.seed, run.resolved["model"]) | _FURTHER) for step in range(5)]
        metrics = [Metric(key, value, 1000 + step, step) for step, of_step in values for key, value in of_step.items()]
        client.log_batch(run_id, metrics=metrics)
        experiment.close(run_id, "finished", finished=True)
        write_state(plan.run_folder(run), RunState(Status.FINISHED, run_id, started=0.0, ended=5.0))
    terminal = Console(record=True, width=200, file=(tmp_path / "terminal").open("w"))
    answer(plan, experiment, terminal, redraw=True)
    return terminal.export_text()


@pytest.mark.slow
def test_study_through_the_rest_interface(mlflow_server: str, told: str) -> None:
    def ask(call: str, **query: Any) -> Any:
        answer = requests.get(f"{mlflow_server}/api/2.0/mlflow/{call}", params=query, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def search(experiment_id: str, wanted: str) -> list[dict[str, Any]]:
        body = {"experiment_ids": [experiment_id], "filter": wanted}
        answer = requests.post(f"{mlflow_server}/api/2.0/mlflow/runs/search", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["runs"])

    def tags(run: dict[str, Any]) -> dict[str, str]:
        return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}

    [link] = re.findall(rf"{re.escape(mlflow_server)}/\S+#\S+", told)
    page = requests.get(link, timeout=30)  # what follows the # is for the page's own script
    assert page.status_code == 200
    assert "text/html" in page.headers["Content-Type"]
    experiment_id, view = re.findall(r"/experiments/(\d+)/runs\?.*viewStateShareKey=(\S+)", link)[0]
    experiment = ask("experiments/get", experiment_id=experiment_id)["experiment"]
    assert experiment["name"] == "tiny"
    own = {tag["key"]: tag["value"] for tag in experiment["tags"]}
    envelope = json.loads(own[f"mlflow.sharedViewState.{view}"])
    assert envelope["name"] == "tiny: arms"
    state = json.loads(zlib.decompress(base64.b64decode(envelope["state"].removeprefix("deflate;"))))

    found = search(experiment_id, "")
    runs = search(experiment_id, state["searchFilter"])  # the view leaves the summary out
    assert len(found) == len(runs) + 1
    colours = {(tags(run)["arm"], tags(run)["mlflow.runColor"]) for run in runs}
    assert colours == {("baseline", "#000000"), ("fast", "#0072B2")}
    names = {(tags(run)["sweep"], tags(run)["arm"], tags(run)["seed"]) for run in runs}
    assert names == {("tiny", arm, seed) for arm in ("baseline", "fast") for seed in ("0", "1")}
    assert not any("mlflow.parentRunId" in tags(run) for run in found)  # flat: nothing to unfold
    assert all(run["info"]["status"] == "FINISHED" for run in found)

    [summary] = search(experiment_id, "tags.`role` = 'summary'")
    note = tags(summary)["mlflow.note.content"]
    assert "**Does a faster model learn faster?**" in note
    assert re.search(
        r"- fast: (helps|inconclusive)\. Compared with baseline, validation task loss changed by -\d", note
    )
    run_id = summary["info"]["run_id"]
    files = {file["path"] for file in ask("artifacts/list", run_id=run_id, path="report")["files"]}
    pictures = ("effects", "curves", "expert_load", "expert_flow")
    assert {"report/report.html", *(f"report/{name}.png" for name in pictures)} <= files
    shown = json.loads(tags(summary)["mlflow.loggedArtifacts"])
    assert {"path": "report/tables/effect_on_validation_task_loss.json", "type": "table"} in shown
    query = {"path": shown[0]["path"], "run_uuid": run_id}
    table = requests.get(f"{mlflow_server}/get-artifact", params=query, timeout=30).json()
    assert table["columns"][:3] == ["arm", "final", "effect"]
    assert [row[0] for row in table["data"]] == ["baseline", "fast"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@needs_chromium
def test_the_printed_link_opens_charts_grouped_by_arm(mlflow_server: str, told: str, tmp_path: Path) -> None:
    [link] = re.findall(rf"{re.escape(mlflow_server)}/\S+#\S+", told)
    done = open_page(link, tmp_path / "profile", 20_000, "--window-size=1800,2400")
    page = re.sub(r"<style.*?</style>", "", done.stdout, flags=re.DOTALL)
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    for shown in ("Group by: arm", "Group: baseline 2", "Group: fast 2", "4 matching runs"):
        assert shown in text
    for section in ("Primary metric (1)", "Task loss (1)", "Stability (1)", "Expert load (1)"):
        assert section in text
    assert "tiny summary" not in text
    for colour in ("rgb(0, 0, 0)", "rgb(0, 114, 178)"):  # beside each run of the two arms
        assert page.count(f"background-color: {colour}") >= 2
