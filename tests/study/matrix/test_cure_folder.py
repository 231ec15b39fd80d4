"""A folder of cure studies, from empty to the repetition of its strongest cells, in a real MLflow store."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study import cure_folder
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.plan.selection import select
from lightning_moevlm.study.sweep import Builders
from lightning_moevlm.tracking.read.runs import find_runs
from tests.study.matrix.cure_runs import fill_store, loss_by_share, write_cures
from tests.study.tiny_study import describe, resolve

OUTPUT = ("advice.md", "matrix.html", "matrix.json", "matrix.md", "matrix.png", "matrix_dark.png")


def builders() -> Builders:
    return Builders(resolve, describe, lambda data: pytest.fail("data is not opened"))  # type: ignore[arg-type, return-value]


def test_a_folder_is_run_drawn_and_repeated(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    design = {"all": [], "on_healthy": [], "fresh_seeds": [7, 8]}
    for name in ("fever", "chill"):
        write_cures(tmp_path / "cures", name, ("warm",), uri, design=design, seeds=[0, 1])
    told = Console(record=True, width=200, file=(tmp_path / "out.txt").open("w"))
    cures = cure_folder.plan_folder("cures/", builders)
    assert [plan.comparison.name for plan in cures.plans] == ["chill", "fever"]
    matrix, repetitions = cure_folder.draw(cures, builders, told)
    assert repetitions == ()
    assert {name: len(runs) for name, runs in matrix.missing.items()} == {"chill": 6, "fever": 6}
    assert "12 runs have no result yet" in told.export_text()

    trained: list[tuple[str, int]] = []

    def run_study(planned: Plan, only: Sequence[str]) -> int:
        assert only == ()
        trained.append((planned.comparison.name, fill_store(planned, uri, loss_by_share(warm=1.0))))
        return 0

    assert cure_folder.run(cures, builders, told, run_study) == 0
    assert trained == [("chill", 6), ("fever", 6), ("chill_fresh", 6), ("fever_fresh", 6)]
    assert "fever (+" in told.export_text()
    trained.clear()
    assert cure_folder.run(cures, builders, told, run_study) == 0
    assert [count for _, count in trained] == [0, 0, 0, 0]  # nothing is left to do
    [fever] = [row for row in cure_folder.list_rows(cures, builders) if row["illness"] == "fever"]
    assert fever["cells"][0]["fresh"]["share"]["estimate"] == pytest.approx(1.0, abs=0.02)  # type: ignore[index]

    assert (tmp_path / "runs/sweeps/cures_matrix/matrix.html").exists()
    [summary] = find_runs(uri, "cures_matrix")
    assert {one.path for one in MlflowClient(uri).list_artifacts(summary.run_id, "report")} == {
        f"report/{name}" for name in OUTPUT
    }


def test_a_part_of_the_seeds_is_drawn_and_repeated(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that are left out are missing nowhere; arms that are named are a look at a part, and repeat nothing."""
    monkeypatch.chdir(tmp_path)
    design = {"all": [], "on_healthy": [], "fresh_seeds": [7, 8], "fresh_arms": ["sick__warm"]}
    write_cures(tmp_path / "cures", "fever", ("warm",), uri, design=design, seeds=[0, 1, 2])
    told = Console(record=True, width=200, file=(tmp_path / "out.txt").open("w"))
    calls: list[tuple[str, tuple[str, ...]]] = []

    def run_study(planned: Plan, only: Sequence[str]) -> int:
        calls.append((planned.comparison.name, tuple(only)))
        fill_store(select(planned, only), uri, loss_by_share(warm=1.0))
        return 0

    arms = ("arm=healthy,sick",)
    assert cure_folder.run(cure_folder.plan_folder("cures", builders, arms), builders, told, run_study) == 0
    part = ("seed=0,1",)
    cures = cure_folder.plan_folder("cures", builders, part)
    assert cure_folder.run(cures, builders, told, run_study) == 0
    assert calls == [("fever", arms), ("fever", part), ("fever_fresh", ())]
    told.export_text()
    matrix, _ = cure_folder.draw(cures, builders, told)
    [fever] = matrix.rows
    assert (fever.seeds, matrix.missing) == ((0, 1), {})
    text = told.export_text()
    assert "This matrix is of the seeds 0, 1 alone; 2 are left out." in text
    assert "1 of the 1 verdicts that were repeated are the same on fresh seeds." in text
    whole, named = cure_folder.draw(cure_folder.plan_folder("cures", builders), builders, told)
    assert (whole.part, len(whole.missing["fever"])) == ("", 1)
    assert [[arm.name for arm in plan.comparison.arms] for plan in named] == [["healthy", "sick", "sick__warm"]]
    assert whole.rows[0].cells[0].effect is None and whole.rows[0].cells[0].fresh is not None  # named: in any case
    with pytest.raises(UserError, match=r"fever has no seed '9'"):
        cure_folder.draw(cure_folder.plan_folder("cures", builders, ("seed=9",)), builders, told)


def test_a_stopped_study_stops_the_folder(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fever", "chill"):
        write_cures(tmp_path / "cures", name, ("warm",), uri, design={"all": [], "on_healthy": []})
    cures = cure_folder.plan_folder("cures", builders)
    ran: list[str] = []

    def run_study(planned: Plan, only: Sequence[str]) -> int:
        ran.append(planned.comparison.name)
        return 130

    assert cure_folder.run(cures, builders, Console(quiet=True), run_study) == 130
    assert ran == ["chill"]
    assert not (tmp_path / "runs/sweeps/cures_matrix").exists()


def test_what_is_no_folder_of_cure_studies_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refusal(folder: str) -> str:
        with pytest.raises(UserError) as refused:
            cure_folder.plan_folder(folder, builders)
        return str(refused.value)

    assert "there is no folder nowhere; give one that holds cure studies" in refusal("nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty holds no study; put cure studies there" in refusal("empty")
    file = write_cures(tmp_path / "mixed", "fever", ("warm",))
    file.write_text(re.sub(r"design:\n(  .*\n)+", "design: one_in\n", file.read_text()))
    assert "not a cure study; give it the design `cures`" in refusal("mixed")
