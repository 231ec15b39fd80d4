"""`moevlm experts` on a real run: by name, folder and checkpoint, and refusals in a line."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.cli.main import main
from lightning_moevlm.cli.runs.experts import expand_shorthand
from lightning_moevlm.common.errors import UserError
from tests.conftest import run_in
from tests.small_run import SMALL, budget

QUICK = ("--samples=40", "--draws=19")


@pytest.fixture(scope="module")
def trained(shared_workplace: Path) -> tuple[Path, Path]:
    """A workplace and the folder of a run in it."""
    run_in(shared_workplace, "fit", *SMALL, *budget(2), "--trainer.logger.init_args.run_name=observed")
    (checkpoint,) = shared_workplace.glob("runs/*/*/checkpoints/last.ckpt")
    return shared_workplace, checkpoint.parent.parent


@pytest.fixture
def run(trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained[0])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return trained[1]


def records(*arguments: str) -> list[dict[str, Any]]:
    assert main(["experts", *arguments, *QUICK, "--json=found.json"]) == 0
    found: list[dict[str, Any]] = json.loads(Path("found.json").read_text())
    return found


def test_a_run_by_name_and_a_lonely_checkpoint_agree(run: Path, tmp_path: Path) -> None:
    by_name = records("observed", "--split=train")
    assert {each["layer"] for each in by_name} == {"blocks.1.ffn.image", "blocks.1.ffn.text"}
    assert {"image/category", "text/word"} <= {each["label"] for each in by_name}
    assert (run / "experts/choices.safetensors").is_file()
    page = (run / "experts/experts.html").read_text("utf-8")
    assert "observed" in page and "--split train --samples 40 --seed 0" in page
    (artifact,) = Path("runs").glob("**/artifacts/experts/experts.html")
    assert artifact.read_text("utf-8") == page and artifact.with_suffix(".json").is_file()
    lonely = shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "lonely.ckpt")
    config = str(run / "config/config.yaml")
    assert records(str(lonely), "-c", config, "--split=train") == by_name
    assert (tmp_path / "lonely-experts/choices.safetensors").is_file()


def test_a_configuration_has_three_spellings() -> None:
    for spelling in ("-c", "--config", "--config_file"):
        assert expand_shorthand(["experts", "x.ckpt", spelling, "FILE"]) == [
            "experts",
            "x.ckpt",
            "--config_file",
            "FILE",
        ]
        assert expand_shorthand([f"{spelling}=FILE"]) == ["--config_file=FILE"]


def test_others_are_a_list_or_repeated() -> None:
    for given, expected in (
        (["--others", "A", "--others=B"], ["--others+", "A", "--others+=B"]),
        (["--others", "[A,B]"], ["--others", "[A,B]"]),
        (["--others=[A]", "x.ckpt"], ["--others=[A]", "x.ckpt"]),
    ):
        assert expand_shorthand(given) == expected


def test_mistakes_are_told_in_a_line(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lonely = shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "lonely.ckpt")
    with closing(sqlite3.connect("foreign.db")) as foreign:
        foreign.execute("CREATE TABLE mine (value)")
    before = Path("foreign.db").read_bytes()
    for arguments, told in (
        ([str(lonely)], "in the folder of no run"),
        (["observed", "--ckpt_path=first.ckpt"], "first.ckpt is no file: give a checkpoint of a run"),
        (["observed", "--samples=0"], "samples is 0"),
        (["observed", "--split=train", "--samples=7", "--remove=next"], "samples is 7: choose 8 or more of the split"),
        (["observed", "--seed=-1"], "seed is -1: choose 0 or more"),
        (["observed", "--others", "observed"], "--others names observed, which is this run itself"),
        (["observed", "-c", "conf/quickstart.yaml"], "is of a run that has the configuration of its training"),
        ([str(run), "--tracking_uri=sqlite:///nowhere.db"], f"there is no run {run.name} in sqlite:///"),
        (["observed", "--tracking_uri=sqlite:///foreign.db"], "is not an MLflow database"),
        (["observed", f"--json={tmp_path}"], "is a folder. Name a file."),
        (["observed", "--data=nowhere"], "no set of shards in nowhere"),
    ):
        assert main(["experts", *arguments]) == 2
        assert told in " ".join(capfd.readouterr().err.split())
    assert not Path("nowhere.db").exists() and Path("foreign.db").read_bytes() == before


def test_a_run_is_read_where_its_store_is_not(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = shutil.copytree(run, tmp_path / "runs" / "1" / run.name, ignore=shutil.ignore_patterns("experts"))
    shutil.copytree("data", tmp_path / "data", symlinks=True)
    monkeypatch.chdir(tmp_path)
    records(str(alone), "--split=train")
    assert (alone / "experts/experts.html").is_file() and not (tmp_path / "runs/mlflow.db").exists()


def test_an_error_after_routing_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise UserError("no section today")

    monkeypatch.setattr("lightning_moevlm.cli.runs.experts.make_sections", fail)
    there = {path.name for path in Path().iterdir()}
    assert main(["experts", "observed", "--split=train", *QUICK, "--out=nothing"]) == 2
    assert "no section today" in capfd.readouterr().err
    assert {path.name for path in Path().iterdir()} == there


def test_another_family_is_refused_before_routing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    twin = shutil.copytree(run, tmp_path / "twin")

    def refuse(*arguments: object) -> None:
        raise UserError("two families")

    monkeypatch.setattr("lightning_moevlm.atlas.history.follow.refuse_other_family", refuse)
    monkeypatch.setattr("lightning_moevlm.atlas.make_atlas.make_atlas", lambda *arguments: pytest.fail("too early"))
    assert main(["experts", "observed", "--others", str(twin)]) == 2
    assert f"--others {twin}: two families" in " ".join(capfd.readouterr().err.split())


def test_parts_are_made_on_demand(run: Path, tmp_path: Path) -> None:
    twin = str(shutil.copytree(run, tmp_path / "twin"))
    asked = ("observed", "--split=train", "--remove=next", f"--others=['{twin}']")
    assert main(["experts", *asked, *QUICK, "--out=parts"]) == 0
    written = json.loads(Path("parts/experts.json").read_text())
    needs, seeds = written["needs"], written["seeds"]
    assert needs["samples"] == 40 and len(needs["experts"]) == 2 * 4 and needs["groups"]["all samples"] == 40
    assert {each["routing"] for each in needs["layers"]} >= {"random experts", "hashed experts"}
    assert all(place["agreement"] == 1 for place in seeds[twin])
    page = Path("parts/experts.html").read_text()
    assert "What needs which expert?" in page and "Does it repeat?" in page and "When did it come about?" not in page


def test_a_history_needs_checkpoints_of_a_run(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lonely, config = (
        shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "lonely.ckpt"),
        str(run / "config/config.yaml"),
    )
    for arguments, told in (
        (["observed"], "needs two checkpoints of different steps, and the run has 1"),
        ([str(lonely), "-c", config], "this checkpoint is in the folder of none"),
    ):
        assert main(["experts", *arguments, "--history=true"]) == 2
        assert told in " ".join(capfd.readouterr().err.split())
    assert main(["experts", "observed", "--others=['nobody']"]) == 2
