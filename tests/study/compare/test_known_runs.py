"""A run that another study has made is taken up, not trained again; and only if it is the same in all that counts."""

import dataclasses
import math
import shutil
import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.compare.collect_results import collect_results
from lightning_moevlm.study.compare.known_runs import KnownRuns, find_known, take_known
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.report.tables.effect_tables import models_table
from lightning_moevlm.study.report.tables.plan_tables import plan_table, status_table
from lightning_moevlm.study.run.ledger import Status, hold_study, read_ledger
from lightning_moevlm.study.run.mlflow_runs import StudyRuns, open_experiment
from lightning_moevlm.study.run.to_do import find_waiting_runs
from lightning_moevlm.tracking.read.runs import find_runs, metric_history
from lightning_moevlm.tracking.record.dataset_input import DIGEST_TAG
from lightning_moevlm.tracking.record.provenance import CODE_TAG, code_digest, versions
from tests.study.tiny_study import engine_of, plan_of, sweep, write_project

DATA = "5" * 64
TAGS = {DIGEST_TAG: DATA, CODE_TAG: code_digest(), **{f"version/{name}": text for name, text in versions().items()}}


@pytest.fixture(scope="module")
def trained(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the study `tiny`: two arms, two seeds, tagged as real runs are."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copyfile(migrated_database, folder / "mlflow.db")
    _, experiment, tally, _ = sweep(write_project(folder, f"sqlite:///{folder / 'mlflow.db'}"))
    assert tally.started == 4
    for run_id in experiment.ids():
        experiment.tag(run_id, TAGS)
        MlflowClient(experiment.uri).log_param(run_id, "model.speed", "0.5")
    return folder / "mlflow.db"


@pytest.fixture
def uri(trained: Path, tmp_path: Path) -> str:
    shutil.copyfile(trained, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def other_study(folder: Path, uri: str, **changes: object) -> Plan:
    """The same study under another name."""
    return plan_of(write_project(folder, uri, changes).rename(folder / "again.yaml"))


def look(plan: Plan, uri: str, data: str = DATA) -> KnownRuns:
    return find_known(plan, uri, lambda config: data)


def taken_up(plan: Plan, uri: str) -> StudyRuns:
    with hold_study(plan.folder):
        experiment = open_experiment(uri, plan.comparison.name)
        assert len(take_known(plan, experiment, look(plan, uri))) == 4
    return experiment


def test_the_plan_names_runs_of_another_study(uri: str, tmp_path: Path) -> None:
    plan = other_study(tmp_path, uri)
    known = look(plan, uri)
    assert known.describe(4) == ("4 of 4 known from study tiny",)
    table = plan_table(plan, dict.fromkeys((run.folder for run in plan.runs), "planned"), known)
    assert {row[2] for row in table.rows} == {"known from tiny"}
    assert any("With --reuse=false it trains them again" in note for note in table.notes)
    assert not plan.folder.exists()  # nothing is written by looking


def test_a_taken_run_belongs_to_the_study_and_names_its_origin(uri: str, tmp_path: Path) -> None:
    plan = other_study(tmp_path, uri)
    experiment = taken_up(plan, uri)
    assert find_waiting_runs(plan, experiment, engine_of(), retry=False) == []
    sources = {row.tags["digest"]: row for row in find_runs(uri, "tiny", {"role": "arm"})}
    rows = find_runs(uri, "again", {"role": "arm"})
    assert [row.name for row in rows] and len(rows) == 4
    for row in rows:
        source = sources[row.tags["digest"]]
        assert row.tags["taken_from"] == f"tiny/{source.name} ({source.run_id})"
        assert (row.tags["sweep"], row.tags["outcome"], row.status) == ("again", "finished", "FINISHED")
        assert (row.start_ms, row.end_ms, row.params) == (source.start_ms, source.end_ms, source.params)
        assert TAGS.items() <= row.tags.items()
        mine, theirs = metric_history(uri, row.run_id), metric_history(uri, source.run_id)
        assert mine == theirs and len(mine) > 50
    ledger = read_ledger(plan)
    assert {(state.status, state.attempts) for _, state in ledger} == {(Status.FINISHED, 0)}
    assert all("taken from tiny/" in row[-1] for row in status_table(plan, ledger).rows)

    result = collect_results(plan, ledger, uri)
    assert [arm.finished for arm in result.arms] == [2, 2]
    assert "4 of 4 runs were taken from study tiny." in " ".join(models_table(result).notes)
    assert result.unlike == ()  # all of them are from there
    assert look(plan, uri) == KnownRuns()  # nothing is left to take
    third = dataclasses.replace(plan, folder=tmp_path / "third")
    assert {known.study for known in look(third, uri).taken.values()} == {"tiny"}  # copies are no sources


def test_a_study_that_is_partly_taken_says_that_speeds_are_of_other_times(uri: str, tmp_path: Path) -> None:
    plan = other_study(tmp_path, uri, seeds=[0, 1, 2])
    assert look(plan, uri).describe(6) == ("4 of 6 known from study tiny",)
    experiment = taken_up(plan, uri)
    waiting = find_waiting_runs(plan, experiment, engine_of(), retry=False)
    assert [run.seed for run in waiting] == [2, 2]


def test_a_run_that_was_half_taken_is_taken_again(uri: str, tmp_path: Path) -> None:
    plan = other_study(tmp_path, uri)
    open_experiment(uri, "again").create(plan.runs[0])  # killed in the middle of copying
    taken_up(plan, uri)
    assert len(find_runs(uri, "again")) == 4


def test_the_rule_of_the_study_that_takes_decides(uri: str, tmp_path: Path) -> None:
    plan = other_study(tmp_path, uri, diverged={"times_untrained": 0.01})
    taken_up(plan, uri)
    assert {state.status for _, state in read_ledger(plan)} == {Status.DIVERGED}


def test_non_finite_values_are_taken_as_they_are(uri: str, tmp_path: Path) -> None:
    plan = other_study(tmp_path, uri)
    known = next(iter(look(plan, uri).taken.values()))
    MlflowClient(uri).log_metric(known.run_id, "odd", math.nan, step=1)
    MlflowClient(uri).log_metric(known.run_id, "odd", math.inf, step=2)
    experiment = taken_up(plan, uri)
    values = [point.value for row in experiment.ids() for point in metric_history(uri, row, ["odd"])]
    assert [math.isnan(values[0]), values[1]] == [True, math.inf]


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"outcome": "failed"}, "there it has failed"),
        ({"outcome": "stopped early"}, "there it has stopped early"),
        ({"outcome": "diverged"}, "there it has diverged"),
        ({CODE_TAG: "0" * 64}, "this package's code has changed since"),
        ({CODE_TAG: None}, "its code_digest is not known"),
        ({DIGEST_TAG: "6" * 64}, "the data has changed since"),
        ({"version/torch": "1.0"}, "torch has another version"),
        ({"changed_param/model.speed": "0.6"}, "it was resumed with other values"),
    ],
)
def test_a_different_run_is_not_taken_and_the_reason_is_given(
    uri: str, tmp_path: Path, tags: dict[str, str | None], why: str
) -> None:
    for row in find_runs(uri, "tiny", {"role": "arm", "arm": "fast"}):
        for key, value in tags.items():
            if value is None:
                MlflowClient(uri).delete_tag(row.run_id, key)
            else:
                MlflowClient(uri).set_tag(row.run_id, key, value)
    told = look(other_study(tmp_path, uri), uri).describe(4)
    assert told == ("2 of 4 known from study tiny", f"2 of 4 have run in another study and are not taken: {why}")


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": {"max_steps": 5}},
        {"seeds": [7, 8]},
        {"all_arms": {"model.skew": 0.3}},
        {"budget": {"minutes": 1}},  # the clock gives another run each time
    ],
)
def test_another_configuration_seed_or_budget_is_another_run(uri: str, tmp_path: Path, changes: dict) -> None:
    assert look(other_study(tmp_path, uri, **changes), uri) == KnownRuns()


def test_runs_without_the_deciding_metric_are_not_taken(uri: str, tmp_path: Path) -> None:
    plan = other_study(tmp_path, uri, primary={"metric": "val/accuracy_image"})
    assert "logged no val/accuracy_image" in look(plan, uri).describe(4)[0]


@pytest.mark.parametrize("part", [{"class_path": "my_package.MyRouter"}, "my_package.MyRouter"])
def test_code_of_ones_own_is_never_known_to_be_the_same(uri: str, tmp_path: Path, part: object) -> None:
    told = look(with_part(other_study(tmp_path, uri), part), uri).describe(4)
    why = "it uses my_package.MyRouter, whose code is not known to be the same"
    assert told == (f"4 of 4 have run in another study and are not taken: {why}",)


def test_a_file_that_is_read_is_never_known_to_be_the_same(uri: str, tmp_path: Path) -> None:
    codebook = tmp_path / "codebook.pt"  # may have been fitted anew under its name
    plan = with_part(other_study(tmp_path, uri), {"path": str(codebook)})
    assert look(plan, uri).describe(4) == ("4 of 4 known from study tiny",)
    codebook.write_bytes(b"other centroids")
    why = f"it reads {codebook}, whose content is not known to be the same"
    assert look(plan, uri).describe(4) == (f"4 of 4 have run in another study and are not taken: {why}",)


def with_part(plan: Plan, part: object) -> Plan:
    runs = [
        dataclasses.replace(run, resolved=run.resolved | {"model": run.resolved["model"] | {"parts": [part]}})
        for run in plan.runs
    ]
    return dataclasses.replace(plan, runs=tuple(runs))


def test_runs_that_were_deleted_and_data_that_is_gone(uri: str, tmp_path: Path) -> None:
    plan = other_study(tmp_path, uri)

    def gone(config: object) -> str:
        raise UserError("there is no set of shards")

    with pytest.raises(UserError, match="no set of shards"):
        find_known(plan, uri, gone)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as store:
        store.execute("UPDATE runs SET lifecycle_stage = 'deleted'")
    assert look(plan, uri) == KnownRuns()
    assert find_known(plan, uri, gone) == KnownRuns()  # nothing to take: the data is not asked for
