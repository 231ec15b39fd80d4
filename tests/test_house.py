"""Rules of the house that a tool does not check."""

import re
import tomllib
from pathlib import Path

from lightning_moevlm.contracts import metric_keys
from tests.conftest import PROJECT

IN_EVERY_FOLDER = ("__init__.py", "__pycache__", "py.typed", "README.md")
SOURCES = sorted((PROJECT / "lightning_moevlm").rglob("*.py"))


def test_no_file_is_long() -> None:
    long = {path.name: lines for path in SOURCES if (lines := len(path.read_text("utf-8").splitlines())) > 400}
    assert long == {}


def test_no_folder_is_full() -> None:
    folders = [PROJECT / "lightning_moevlm", *{path.parent for path in SOURCES}]
    entries = {folder: [each for each in folder.iterdir() if each.name not in IN_EVERY_FOLDER] for folder in folders}
    assert {str(folder): len(inside) for folder, inside in entries.items() if len(inside) > 12} == {}


def test_nothing_is_unpickled_and_no_shell_is_called() -> None:
    for path in SOURCES:
        text = path.read_text("utf-8")
        for forbidden in ("pickle.load", "Unpickler(", "shell=True", "os.system", "weights_only=False", "eval("):
            assert forbidden not in text.replace(".eval(", "").replace("literal_eval(", ""), f"{path}: {forbidden}"


def test_mlflow_is_imported_where_it_is_used() -> None:
    """It takes a third of all the time that imports take, and a mistake is to be told without that wait."""
    for path in SOURCES:
        for line in path.read_text("utf-8").splitlines():
            assert not line.startswith(("import mlflow", "from mlflow")), f"{path}: {line}"


def test_transformers_is_imported_where_it_is_used() -> None:
    """It is an extra, and takes seconds; nothing is slower to start because it is installed."""
    for path in SOURCES:
        if path.name == "modeling_moevlm.py":  # transformers imports it, from the folder of an exported model
            continue
        for line in path.read_text("utf-8").splitlines():
            assert not re.match(
                r"(import|from) (transformers|peft|accelerate)\b|from .*modeling_moevlm import", line
            ), f"{path}: {line}"


def test_metric_keys_are_declared_once() -> None:
    patterns = [metric.pattern for metric in metric_keys.ALL]
    assert len(patterns) == len(set(patterns)) > 20
    for metric in metric_keys.ALL:
        example = metric.pattern.replace("{stage}", "val").replace("{modality}", "text")
        example = example.replace("{term}", "text").replace("{block}", "1").replace("{expert}", "0")
        assert metric_keys.find_metric(example) is metric
        assert metric.match(example) is not None


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (PROJECT / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line
    }
    names = {name_of(requirement) for requirement in wanted}
    assert names <= pinned, names - pinned
    assert "torch==2.13.0" in (PROJECT / "constraints.txt").read_text("utf-8").splitlines()


def name_of(requirement: str) -> str:
    for mark in ("[", ">", "=", "<", "!"):
        requirement = requirement.split(mark)[0]
    return requirement.strip().lower().replace("_", "-")


def test_top_level_is_the_agreed_one() -> None:
    allowed = {
        "pyproject.toml", "README.md", "Makefile", "constraints.txt", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
        "lightning_moevlm", "conf", "ablations", "data", "tests",
    }  # fmt: skip
    ignored = {"runs", "build", "dist", "mlruns"}
    present = {path.name for path in Path(PROJECT).iterdir() if not path.name.startswith(".")}
    assert {name for name in present if not name.endswith(".egg-info")} - ignored <= allowed
