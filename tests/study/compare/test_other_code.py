"""A run whose code has changed since is named, and trained again on request; its old run stays in MLflow."""

import dataclasses
import importlib
import shutil
import sqlite3
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.compare.collect_results import collect_results
from lightning_moevlm.study.compare.other_code import describe_other_code, find_other_code, replace_runs
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.report.tables.plan_tables import status_table
from lightning_moevlm.study.run.ledger import hold_study, read_ledger
from lightning_moevlm.study.run.mlflow_runs import StudyRuns, open_experiment
from lightning_moevlm.study.run.to_do import find_waiting_runs
from lightning_moevlm.tracking.read.run_selection import choose_runs
from lightning_moevlm.tracking.read.runs import find_runs, read_run
from lightning_moevlm.tracking.record.foreign_code import foreign_code_tags
from lightning_moevlm.tracking.record.provenance import CODE_TAG, code_digest
from tests.study.tiny_study import engine_of, plan_of, sweep, write_project

MODULE = "sharp_parts"


@pytest.fixture(scope="module")
def trained(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study `tiny` after its two arms with two seeds have run."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copyfile(migrated_database, folder / "mlflow.db")
    _, _, tally, _ = sweep(write_project(folder, f"sqlite:///{folder / 'mlflow.db'}"))
    assert tally.started == 4
    return folder


@pytest.fixture
def study(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, StudyRuns]:
    """The study with a router of one's own in the arm `fast`; its runs are tagged as real ones are."""
    folder = tmp_path / "project"
    shutil.copytree(trained, folder)
    (folder / f"{MODULE}.py").write_text("class SharpRouter: sharpness = 1\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    plan = plan_of(write_project(folder, uri))
    runs = tuple(with_router(run) if run.arm == "fast" else run for run in plan.runs)
    plan, experiment = dataclasses.replace(plan, runs=runs), open_experiment(uri, "tiny")
    for run in plan.runs:
        for row in experiment.find(run):
            experiment.tag(row.run_id, {CODE_TAG: code_digest()} | foreign_code_tags(run.resolved))
    return plan, experiment


def with_router(run):
    router = {"class_path": f"{MODULE}.SharpRouter"}
    return dataclasses.replace(run, resolved=run.resolved | {"model": run.resolved["model"] | {"router": router}})


def edit(plan: Plan) -> None:
    (plan.study.file.parent / f"{MODULE}.py").write_text("class SharpRouter: sharpness = 100\n")


def lines(plan: Plan, experiment: StudyRuns) -> tuple[str, ...]:
    return describe_other_code(plan, find_other_code(plan, experiment.uri))


def test_an_edited_router_is_named_with_its_runs(study: tuple[Plan, StudyRuns]) -> None:
    plan, experiment = study
    assert lines(plan, experiment) == ()
    edit(plan)
    [line] = lines(plan, experiment)
    command = f"`moevlm sweep run {plan.study.file} --retrain true`"
    assert line == f"fast-seed0, fast-seed1 were trained with other code of {MODULE}; {command} trains them again"
    one = dataclasses.replace(plan, runs=tuple(run for run in plan.runs if run.name == "fast-seed1"))
    [line] = lines(one, experiment)
    assert line == f"fast-seed1 was trained with other code of {MODULE}; {command} trains it again"
    assert line in status_table(one, read_ledger(one), (line,)).notes


def test_an_upgrade_of_this_package_is_one_line_for_all_runs(study: tuple[Plan, StudyRuns]) -> None:
    plan, experiment = study
    for run_id in experiment.ids():
        experiment.tag(run_id, {CODE_TAG: "0" * 64})
    [line] = lines(plan, experiment)
    assert line.startswith("4 of 4 runs were trained with other code of lightning_moevlm; ")


def test_runs_that_recorded_no_code_are_taken_as_they_are(study: tuple[Plan, StudyRuns]) -> None:
    plan, experiment = study
    edit(plan)
    with sqlite3.connect(experiment.uri.removeprefix("sqlite:///")) as store:
        store.execute(f"DELETE FROM tags WHERE key LIKE '{CODE_TAG}%'")
    assert lines(plan, experiment) == ()


def test_retraining_replaces_the_run_and_keeps_it_in_mlflow(study: tuple[Plan, StudyRuns]) -> None:
    plan, experiment = study
    edit(plan)
    before = {run.name: experiment.find(run)[0].run_id for run in plan.runs}
    with hold_study(plan.folder):
        told = replace_runs(experiment, find_other_code(plan, experiment.uri))
        waiting = find_waiting_runs(plan, experiment, engine_of(), retry=False)
    assert [run.name for run in waiting] == ["fast-seed0", "fast-seed1"]
    assert told[0] == (
        f"fast-seed0 was trained with other code of {MODULE}; it is trained again, and MLflow keeps the old run "
        f"{before['fast-seed0']}"
    )
    assert lines(plan, experiment) == ()
    assert replace_runs(experiment, []) == ("--retrain has nothing to do: no finished run was trained with other code",)

    result = collect_results(plan, read_ledger(plan), experiment.uri)  # the old results are read no more
    assert [arm.finished for arm in result.arms] == [2, 0]
    again = {run.name: experiment.create(run) for run in waiting}  # as the sweep does, and it deletes no old run
    for name, run_id in again.items():
        old = read_run(experiment.uri, before[name])
        assert old.last["val/task_loss"] > 0 and run_id != old.run_id
        assert (old.tags["role"], old.tags["replaced_because"]) == ("replaced", f"trained with other code of {MODULE}")
    assert len(find_runs(experiment.uri, "tiny")) == 6
    chosen = {row.run_id for row in choose_runs(experiment.uri, ["sweep=tiny"])}
    assert chosen == {before["baseline-seed0"], before["baseline-seed1"], *again.values()}


def test_a_result_whose_folder_was_removed_is_compared_as_well(study: tuple[Plan, StudyRuns]) -> None:
    plan, experiment = study
    edit(plan)
    for run in plan.runs:
        shutil.rmtree(plan.run_folder(run))
    assert [one.run.name for one in find_other_code(plan, experiment.uri)] == ["fast-seed0", "fast-seed1"]


def test_an_unreadable_state_is_removed_without_losing_the_result(study: tuple[Plan, StudyRuns]) -> None:
    plan, experiment = study
    folder = plan.run_folder(plan.runs[0])
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match="remove the folder; a result in MLflow is then read back"):
        read_ledger(plan)
    shutil.rmtree(folder)
    with hold_study(plan.folder):
        assert find_waiting_runs(plan, experiment, engine_of(), retry=False) == []
