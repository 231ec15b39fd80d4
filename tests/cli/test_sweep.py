"""`moevlm sweep` as a person calls it: real training in processes of its own, real SQLite."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_moevlm.cli.sweep import expand_shorthand
from lightning_moevlm.study.run.engines import Engine
from lightning_moevlm.tracking.read.runs import find_runs
from tests.cli.small_study import Moevlm, Study

HERE = "tests.cli.test_sweep"


class Half(Engine):
    """An engine of the user's own that is not done."""


def rows(file: Path) -> list[dict]:
    return json.loads(file.read_text())


@pytest.mark.usefixtures("unrendered")
def test_plan_run_status_report(moevlm: Moevlm, study: Study, workplace: Path) -> None:
    file = study()
    moevlm("sweep", "plan", file, "--json", "plan.json")
    planned = rows(workplace / "plan.json")
    assert [(row["arm"], row["seed"], row["status"]) for row in planned] == [
        ("baseline", 0, "planned"),
        ("dense_twin", 0, "planned"),
    ]
    assert planned[1]["changes"] == {"model.backbone.init_args.sparse_modalities": []}
    assert planned[0]["total_parameters"] > planned[1]["total_parameters"] > 0
    assert planned[0]["active_flops_per_sample"] == pytest.approx(planned[1]["active_flops_per_sample"], rel=0.01)
    assert not (workplace / "runs/sweeps").exists()  # planning writes nothing
    assert "nothing of line has run yet" in moevlm("sweep", "report", file, code=2)

    moevlm("sweep", "run", file, "--jobs", "2")
    moevlm("sweep", "status", file, "--json", "status.json")
    assert [(row["status"], row["attempts"], row["exit_code"]) for row in rows(workplace / "status.json")] == [
        ("finished", 1, 0),
        ("finished", 1, 0),
    ]
    uri = f"sqlite:///{workplace / 'runs/mlflow.db'}"
    tracked = find_runs(uri, "line", {"role": "arm"})
    assert [row.run_id for row in tracked] == [row["run_id"] for row in rows(workplace / "status.json")]
    assert [row.tags["digest"] for row in tracked] == [row["digest"] for row in planned]
    assert all({"val/task_loss", "train/task_loss", "val/accuracy_text"} <= row.last.keys() for row in tracked)

    moevlm("sweep", "run", file)  # nothing is left to do
    moevlm("sweep", "report", file, "--json", "report.json")
    assert [row["finished"] for row in rows(workplace / "report.json")] == [1, 1]
    assert [row["verdict"] for row in rows(workplace / "report.json")] == ["baseline", "inconclusive"]
    assert len(find_runs(uri, "line")) == 3  # two arms and one summary
    html = (workplace / "runs/sweeps/line/report/report.html").read_text()
    assert html.count("<img ") == 7
    assert "at least 2 are needed" in html

    # Another study of the same runs takes them.
    (workplace / file).rename(workplace / "again.yaml")
    moevlm("sweep", "plan", "again.yaml", "--json", "plan.json")
    known = [row["known_from"].partition(" ")[0] for row in rows(workplace / "plan.json")]
    assert known == ["line/baseline-seed0", "line/dense_twin-seed0"]
    moevlm("sweep", "run", "again.yaml")
    moevlm("sweep", "status", "again.yaml", "--json", "status.json")
    own = rows(workplace / "status.json")
    assert [(row["status"], row["attempts"], row["taken_from"]) for row in own] == [
        ("finished", 0, f"line/{row.name} ({row.run_id})") for row in tracked
    ]
    assert len(find_runs(uri, "again")) == 3


def test_mistakes_are_refused_before_anything_is_written(moevlm: Moevlm, study: Study, workplace: Path) -> None:
    def refused(*expected: str, **changes: object) -> None:
        file = study(**changes)
        before = sorted(workplace.rglob("*"))
        [line] = moevlm("sweep", "run", file, code=2).splitlines()
        assert line.startswith("moevlm: error: ")
        for words in expected:
            assert words in line
        assert sorted(workplace.rglob("*")) == before

    router = "model.backbone.init_args.moe.init_args.router"
    refused("line.yaml:1", "'qestion'", "did you mean 'question'?", question="x", qestion="y")
    refused("arm 'odd'", "load_balanc", arms={"baseline": None, "odd": {"model.losses.load_balanc": None}})
    refused("arm 'odd'", "NoRouter", arms={"baseline": None, "odd": {f"{router}.class_path": "NoRouter"}})
    refused("arm 'odd'", "top_k is 5", arms={"baseline": None, "odd": {f"{router}.init_args.top_k": 5}})
    refused("are the same run", arms={"baseline": None, "same": {"data.batch_size": 8}})
    refused("moevlm data build scenes", arms={"baseline": {}, "other": {"data.root": "data/shards/none"}})


def test_a_new_study_plans_at_once(moevlm: Moevlm, workplace: Path) -> None:
    moevlm("sweep", "new", "mine/first.yaml")
    moevlm("sweep", "plan", "mine/first.yaml", "--json", "plan.json")
    assert {row["arm"] for row in rows(workplace / "plan.json")} == {"baseline", "no_router_z"}
    before = (workplace / "mine/first.yaml").read_text()
    assert "mine/first.yaml exists already" in moevlm("sweep", "new", "mine/first.yaml", code=2)
    assert (workplace / "mine/first.yaml").read_text() == before
    assert "use letters, digits and _" in moevlm("sweep", "new", "my study.yaml", code=2)
    assert "give mine.yaml" in moevlm("sweep", "new", "mine", code=2)
    for name in ("study", "lr_sensitivity"):
        moevlm("describe", name, "--json", f"{name}.json")
        assert all(row["meaning"] for row in rows(workplace / f"{name}.json"))
    for kind in ("designs", "metrics"):
        moevlm("list", kind, "--json", f"{kind}.json")
        assert {row["kind"] for row in rows(workplace / f"{kind}.json")} == {kind}
    assert "did you mean lr_sensitivity?" in moevlm("describe", "lr_sensitivty", code=2)


def test_dead_tracking_server_is_one_line(moevlm: Moevlm, study: Study, workplace: Path, monkeypatch) -> None:
    file = study()
    before = sorted(workplace.rglob("*"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    [line] = moevlm("sweep", "run", file, code=2).splitlines()
    assert "http://127.0.0.1:9 does not answer" in line
    assert sorted(workplace.rglob("*")) == before


def test_jobs_must_be_positive(moevlm: Moevlm, study: Study) -> None:
    assert "--jobs is 0" in moevlm("sweep", "run", study(), "--jobs", "0", code=2)


def test_mistakes_in_options_are_one_line(moevlm: Moevlm, study: Study, workplace: Path) -> None:
    file = study()
    before = sorted(workplace.rglob("*"))
    for expected, *options in (
        (
            "line has no arm 'dense_twn'; did you mean 'dense_twin'?",
            "--only",
            "arm=baseline",
            "--only",
            "arm=dense_twn",
        ),
        ("--timeout_minutes is 0; give more than 0", "--timeout-minutes", "0"),
        ("choose LocalEngine, RayEngine or SlurmEngine", "--engine", "rya"),
        ("--engine: Engine is abstract; choose ", "--engine", "Engine"),
        (
            "--engine: Half is abstract; implement attach, ",
            "--engine",
            f"{HERE}.Half",
        ),
        ("OrderedDict is not an Engine; choose ", "--engine", "collections.OrderedDict"),
        ("engine: None is not a valid value; give an Engine", "--engine", "null"),
        ("--engine.num_gpus is -1; give at least 0", "--engine", "local", "--engine.num_gpus", "-1"),
        ("did you mean num_gpus?", "--engine", "local", "--engine.num_gpu", "1"),
    ):
        [line] = moevlm("sweep", "run", file, *options, code=2).splitlines()
        assert expected in line
    assert sorted(workplace.rglob("*")) == before


def test_shorthand_is_expanded() -> None:
    short = ["sweep", "run", "f", "--only", "arm=a", "--only=seed=0", "--engine", "ray", "--engine.num_gpus", "1"]
    assert expand_shorthand(short) == [
        *("sweep", "run", "f", "--only+", "arm=a", "--only+=seed=0"),
        *("--engine", "RayEngine", "--engine.num_gpus", "1"),
    ]
    assert expand_shorthand(["--engine=slurm"]) == ["--engine=SlurmEngine"]
    assert expand_shorthand(["--engine", "my.Engine"]) == ["--engine", "my.Engine"]


def test_run_id_that_looks_like_a_number_stays_a_text(workplace: Path) -> None:
    from lightning_moevlm.configuration.resolver import ConfigResolver
    from lightning_moevlm.study.run.processes.command_line import run_options

    resolver = ConfigResolver()
    for run_id in ("632471343e91", "1234567890" * 3 + "12", "c15a7ec36b46"):
        command = ["-c", "conf/quickstart.yaml", *run_options(run_id, None)]
        assert resolver._parser.parse_args(command).trainer.logger.init_args.run_id == run_id


def test_importing_the_command_is_cheap() -> None:
    heavy = ("torch", "lightning", "mlflow", "matplotlib", "scipy", "numpy")
    probe = f"import sys, lightning_moevlm.cli.sweep; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_pinned_baseline_that_changed_is_refused(moevlm: Moevlm, study: Study, workplace: Path) -> None:
    def pinned_in(told: str) -> str:
        return told.partition("To accept the change: `baseline_digest: '")[2].partition("'")[0]

    told = moevlm("sweep", "plan", study(baseline_digest="0" * 12), code=2)
    digest = pinned_in(told)
    assert "line.yaml:" in told
    # Length and seeds are the study's own.
    moevlm("sweep", "plan", study(baseline_digest=digest, budget={"max_steps": 4}, seeds=[3]))
    overlay = yaml.safe_load((workplace / "small.yaml").read_text())
    overlay["trainer"]["log_every_n_steps"] = 2
    (workplace / "small.yaml").write_text(yaml.safe_dump(overlay))
    [line] = moevlm("sweep", "run", "line.yaml", code=2).splitlines()
    assert f"baseline_digest is {digest}, but the baseline" in line
    assert not (workplace / "runs/sweeps").exists()
