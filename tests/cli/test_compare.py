"""`moevlm compare` as a person calls it: runs of a real configuration in a real store, with points of no training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.cli.compare import expand_shorthand
from lightning_moevlm.configuration.resolver import ConfigResolver, describe_model
from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.plan_study import plan_study
from lightning_moevlm.study.plan.planned_run import Plan
from tests.cli.small_study import Study
from tests.mlflow_server import MlflowServer
from tests.study.many_runs import fill

pytestmark = pytest.mark.usefixtures("unrendered")
ARMS: dict[str, Any] = {
    "baseline": None,
    "no_router_z": {"model.losses.router_z": None},
    "small_batch": {"data.batch_size": 4},
}


@pytest.fixture
def plan(study: Study, workplace: Path) -> Plan:
    """A study whose runs seem to have ended."""
    whole_split = {
        "trainer.limit_val_batches": 1.0,
        "trainer.num_sanity_val_steps": -1,
    }  # also where batches are smaller
    file = study(arms=ARMS, seeds=[0, 1], budget={"max_steps": 500}, all_arms=whole_split)
    planned = plan_study(read_study(Path(file)), ConfigResolver(), describe_model)
    fill(planned, f"sqlite:///{workplace / 'runs/mlflow.db'}", num_points=12)
    return planned


def test_runs_of_a_store(moevlm: Callable[..., str], plan: Plan, workplace: Path) -> None:
    alike = ("baseline-seed0", "sweep=line,arm=no_router_z", "baseline-seed1")
    assert moevlm("compare", *alike, "--report", "report", "--within", "0.5", "--json", "compared.json") == ""
    moevlm("sweep", "report", "line.yaml", "--unfair=true", "--json", "own.json")
    mine, own = (json.loads((workplace / file).read_text()) for file in ("compared.json", "own.json"))
    assert [record["arm"] for record in mine] == ["baseline", "no_router_z"]
    assert mine[1]["effect"]["differences"] == own[1]["effect"]["differences"]
    assert mine[1]["effect"]["interval"] == own[1]["effect"]["interval"]
    assert [record["card"]["active_flops_per_sample"] for record in mine] == [
        plan.cards[arm].active_flops_per_sample for arm in ("baseline", "no_router_z")
    ]
    assert mine[1]["effect"]["within"] == 0.5
    html = (workplace / "report/report.html").read_text()
    assert "Comparison <strong>comparison</strong> · 2 arms × 2 seeds · 500 steps each" in html
    assert "model.losses.router_z: null" in html
    assert "by hand" not in html
    assert (workplace / "report/effects.png").exists()
    before = sorted(workplace.rglob("*"))

    # The study declares the batch of one arm; who compares runs has to say it.
    [line] = moevlm("compare", "sweep=line", code=2).splitlines()
    assert "they differ in samples per step: 8 (baseline, no_router_z); 4 (small_batch)" in line
    assert "If arms are meant to differ in it, add --by arm --by data.batch_size. To compare them anyway" in line
    moevlm("compare", "sweep=line,arm=baseline", "sweep=line,arm=small_batch", "--by", "data.batch_size")
    moevlm("compare", "sweep=line", "--by", "arm", "--by", "data.batch_size", "--json", "compared.json")
    by = [record["arm"] for record in json.loads((workplace / "compared.json").read_text())]
    assert by == ["arm=baseline, batch_size=8", "arm=no_router_z, batch_size=8", "arm=small_batch, batch_size=4"]
    moevlm("compare", "sweep=line", "--unfair=true")
    for expected, *words in (
        ("moevlm compare RUN RUN", "--metric", "val/task_loss"),
        ("there are baseline-seed0", "baselin-seed0", "sweep=line"),
        ("has the name '632471343e91'", "632471343e91"),  # reads as a number, and is a text
        ("--within is -1; give more than 0", *alike, "--within", "-1"),
        ("--guard val/task_loss: write METRIC=AMOUNT", *alike, "--guard", "val/task_loss"),
        ("--guard a=-1: write METRIC=AMOUNT", *alike, "--guard", "a=-1"),
        (
            "did you mean 'val/accuracy_text'? leave it out",
            *alike,
            "--also",
            "val/accuracy_txt",
        ),
        (
            "it is not declared whether lower or higher optim/grad_norm is better",
            *alike,
            "--guard",
            "optim/grad_norm=1",
        ),
        ("there is no store at", *alike, "--tracking_uri", "sqlite:///none.db"),
        ("which is not part of a report", *alike, "--report", "conf"),
        ("could not be written (Not a directory)", *alike, "--report", "line.yaml/report"),
        ("did you mean --metric?", *alike, "--metrc", "val/task_loss"),
        ("arms: baseline, no_router_z", *alike, "--baseline", "no_router"),
    ):
        [line] = moevlm("compare", *words, code=2).splitlines()
        assert expected in line
    assert sorted(workplace.rglob("*")) == before


def test_guards_further_metrics_and_the_correction_of_a_study(
    moevlm: Callable[..., str], plan: Plan, workplace: Path
) -> None:
    words = ["sweep=line", "--unfair=true", "--guard", "val/accuracy_text=0", "--guard", "drop_rate/block1/text=2"]
    moevlm("compare", *words, "--also", "val/accuracy_text", "--json", "compared.json", "--report", "report")
    records = json.loads((workplace / "compared.json").read_text())
    others = records[1:]
    assert [[guard["metric"] for guard in one["effect"]["guards"]] for one in others] == [
        ["val/accuracy_text", "drop_rate/block1/text"]
    ] * 2
    for one in others:
        is_worse = one["effect"]["guards"][0]["worse"] > 0
        assert one["broken_guards"] == (["val/accuracy_text"] if is_worse else [])
    assert all("val/accuracy_text" in one["also"] for one in records)
    # Holm over two: the smaller p is doubled, the larger one is not below it
    small, large = sorted((one["effect"] for one in others), key=lambda effect: effect["p_value"])
    assert small["p_adjusted"] == pytest.approx(min(1.0, 2 * small["p_value"]))
    assert large["p_adjusted"] == pytest.approx(max(large["p_value"], small["p_adjusted"]))
    page = (workplace / "report/report.html").read_text()
    assert "--guard val/accuracy_text=0 --guard drop_rate/block1/text=2 --also val/accuracy_text" in page
    moevlm("compare", *words, "--correction", "none", "--json", "plain.json")
    plain = [one["effect"] for one in json.loads((workplace / "plain.json").read_text())[1:]]
    assert all(effect["p_adjusted"] == effect["p_value"] for effect in plain)


def test_runs_behind_a_server(
    moevlm: Callable[..., str], plan: Plan, workplace: Path, mortal_server: MlflowServer, tmp_path: Path
) -> None:
    """The same records as from the file that the server serves."""
    moevlm("compare", "sweep=line", "--unfair=true", "--json", "file.json")
    store = Path(mortal_server.database.removeprefix("sqlite:///"))
    shutil.copyfile(workplace / "runs/mlflow.db", store)  # as if the server had been there all the time
    words = ["--tracking_uri", mortal_server.address]
    moevlm("compare", "sweep=line", *words, "--unfair=true", "--json", "server.json")
    assert json.loads((workplace / "server.json").read_text()) == json.loads((workplace / "file.json").read_text())
    [line] = moevlm("compare", "sweep=lien", *words, code=2).splitlines()
    assert "there are line" in line
    mortal_server.kill()
    [line] = moevlm("compare", "sweep=line", *words, code=2).splitlines()
    assert "does not answer as an MLflow server" in line


def test_a_model_that_cannot_be_built_costs_its_card_alone(
    moevlm: Callable[..., str], plan: Plan, workplace: Path
) -> None:
    import sqlite3

    with sqlite3.connect(workplace / "runs/mlflow.db") as store:
        store.execute("INSERT INTO params (key, value, run_uuid) SELECT 'model.older', '3', run_uuid FROM runs")
    told = moevlm("compare", "sweep=line,arm=baseline", "sweep=line,arm=no_router_z", "--json", "compared.json")
    assert "arm 'baseline': parameters and FLOPs are unknown, because this version cannot build its model" in told
    records = json.loads((workplace / "compared.json").read_text())
    assert [record["card"] for record in records] == [None, None]
    assert "active FLOPs" not in records[1]["equal"]
    assert records[1]["effect"] is not None


def test_words_without_an_option_are_runs() -> None:
    words = ["compare", "a", "--by", "x", "b", "--json", "-", "--by=y", "--unfair=true", "c", "--help"]
    assert expand_shorthand(words) == [
        *("compare", "--runs+", "a", "--by+", "x", "--runs+", "b", "--json", "-", "--by+=y", "--unfair=true"),
        *("--runs+", "c", "--help"),
    ]
