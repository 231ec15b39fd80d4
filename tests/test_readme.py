"""Every command of the guides runs: as written here, or by `make demo`."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import PROJECT
from tests.data.sources import csv_source

README = (PROJECT / "README.md").read_text(encoding="utf-8")
CODE = (PROJECT / "lightning_moevlm/README.md").read_text(encoding="utf-8")
GUIDES = [
    README,
    CODE,
    *((PROJECT / name / "README.md").read_text(encoding="utf-8") for name in ("data", "conf", "ablations", "tests")),
]
MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")
COMMANDS = list(
    dict.fromkeys(
        line.split("  # ")[0].strip()
        for guide in GUIDES
        for line in re.findall(r"^    (\S.*)$", guide, flags=re.MULTILINE)
    )
)
SLOW = "moevlm data build openmoji --out data/shards/openmoji"  # a slow test builds it


def test_the_front_page_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_every_command_is_one_that_runs_here_or_is_a_target() -> None:
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        tool, first, *_ = shlex.split(command)
        assert tool in ("moevlm", "make"), command
        if tool == "make":
            assert re.search(rf"^{first}:", MAKEFILE, flags=re.MULTILINE), command


SHORT = {  # by subcommand: added to its commands, so that all of them take seconds
    "build": ("--num_samples", "160"),
    "fit": ("--trainer.max_steps=2", "--trainer.num_sanity_val_steps=1", "--trainer.limit_val_batches=1"),
    "test": ("--trainer.limit_test_batches=1",),
}


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["short", "as written"])
def test_commands_run_as_written(short: bool, moevlm: Callable[..., str], workplace: Path) -> None:
    for name in ("scenes", "facts"):  # commands build the real sets
        (workplace / "data/shards" / name).unlink()
    table = csv_source(workplace, 60)  # the reader's own captions.csv and images/
    header, *rows = table.read_text("utf-8").splitlines()
    classed = [f"{header},kind", *(f"{row},kind {number % 3}" for number, row in enumerate(rows))]
    table.write_text("\n".join(classed) + "\n", "utf-8")
    for command in COMMANDS:
        tool, *arguments = shlex.split(command)
        if tool == "moevlm" and command != SLOW and "RUN" not in arguments:  # a run of another set
            if "FILE" in arguments:  # the checkpoint of the command before it
                saved = max(workplace.glob("runs/**/last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
                arguments = [str(saved) if word == "FILE" else word for word in arguments]
            more = [word for name, words in SHORT.items() if short and name in arguments[:2] for word in words]
            moevlm(*arguments, *more)
    assert (workplace / "data/shards/scenes/manifest.json").is_file()


def test_its_python_runs_as_written(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program, _ = re.findall(r"^```python\n(.*?)^```", CODE, flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(program.replace("max_steps=20", "max_steps=2"), found)
    features, trained = found["features"], found["trainer"].lightning_module
    assert features.shape == (12, 40, 64)  # the small set has no more samples to validate on
    assert features.isfinite().all()
    logger = found["trainer"].logger
    run = logger.experiment.get_run(logger.run_id)
    assert run.info.status == "FINISHED" and (workplace / "runs/mlflow.db").is_file()
    assert {"train/task_loss", "val/task_loss", "load_entropy/block1/image"} <= run.data.metrics.keys()
    for name, parameter in found["model"].named_parameters():
        assert torch.equal(parameter, trained.backbone.get_parameter(name)), name


def test_the_map_names_every_folder() -> None:
    folders = {path.name for path in (PROJECT / "lightning_moevlm").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(re.findall(r"`(\w+)/`", CODE))


def test_the_map_names_files_that_exist() -> None:
    for target in re.findall(r"`((?:\w+/)+\w+\.py)`", CODE):
        folder = PROJECT if target.startswith("tests/") else PROJECT / "lightning_moevlm"
        assert (folder / target).is_file(), target


def test_pictures_and_files_exist() -> None:
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert shown
    for target in (*re.findall(r"\]\(([^)h][^)]*)\)", README), *shown):
        assert (PROJECT / target).is_file(), target
    for guide in GUIDES:
        for target in re.findall(r"`((?:conf|ablations|data|tests)/[\w/]+\.(?:yaml|md|py|png))`", guide):
            assert (PROJECT / target).is_file() or (PROJECT / "lightning_moevlm" / target).is_file(), target


def test_demo_runs_what_the_readme_says() -> None:
    demo = MAKEFILE.split("\ndemo:")[1].split("\n\n")[0]
    assert "moevlm data build scenes" in demo and "moevlm sweep run ablations/demo" in demo
    assert shutil.which("make")
