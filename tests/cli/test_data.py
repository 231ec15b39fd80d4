"""`moevlm data` as a user types it: exit codes, what is printed, what is left on disk."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_moevlm.cli.data.commands import COMMANDS
from lightning_moevlm.cli.main import main
from lightning_moevlm.contracts.codebook import load_codebook
from lightning_moevlm.data.format.manifest import read_manifest

SMALL = ["--num_samples", "80", "--image_size", "32", "--num_drawings", "12", "--samples_per_shard", "32"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    assert main(["data", "build", "scenes", "--out", str(root), *SMALL]) == 0
    return root


def test_the_commands() -> None:
    build = COMMANDS["build"]
    assert isinstance(build, dict) and set(build) == {"facts", "openmoji", "scenes"}
    assert set(COMMANDS) == {"answers", "build", "check", "codebook", "convert", "index", "show"}


def test_build_twice_says_that_nothing_is_to_do(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in built.iterdir()}
    assert main(["data", "build", "scenes", "--out", str(built), *SMALL]) == 0
    assert "already built" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in built.iterdir()}


def test_build_with_other_arguments_is_refused(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "build", "scenes", "--out", str(built), *SMALL, "--seed", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "seed 0 there, 1 asked" in line and "--force true" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_samples", "0"], "num_samples is 0"),
        (["--image_size", "8"], "image_size is 8"),
        (["--num_drawings", "1000"], "num_drawings is 1000"),
        (["--vocab_size", "100", "--num_samples", "80"], "vocab_size is 100"),
        (["--samples_per_shard", "0"], "samples_per_shard is 0"),
        (["--image_format", "gif"], "gif"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_bad_arguments_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["data", "build", "scenes", "--out", str(tmp_path / "set"), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_check_prints_a_card_and_writes_records(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(built)]) == 0
    printed = capsys.readouterr().out
    manifest = read_manifest(built)
    assert "CC BY-SA 4.0" in printed and manifest.digest[:12] in printed and "train" in printed
    assert "captions that are cut, by data.max_text_len: " in " ".join(printed.split())
    assert main(["data", "check", str(built), "--json", "-"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["split"] for record in records] == ["train", "val", "test"]
    assert sum(record["num_samples"] for record in records) == 80
    assert {record["manifest_digest"] for record in records} == {manifest.digest}
    assert set(records[0]["cut"]) == {"24", "40", "64", "128"}


def test_check_fails_on_a_truncated_shard(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in built.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[:2000] if path.name == "test-000000.tar" else data)
    assert main(["data", "check", str(tmp_path), "--json", str(tmp_path / "card.json")]) == 2
    printed = capsys.readouterr().err
    assert "test-000000.tar is truncated" in printed and "shard_truncated" in printed
    assert not (tmp_path / "card.json").exists()


def test_show_writes_a_page(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(built), "--split", "train", "--num_samples", "7"]) == 0
    page = built.parent / "scenes.html"
    num_train = read_manifest(built).num_samples("train")
    assert capsys.readouterr().out == f"wrote {page}: 7 of {num_train} pairs of the train split\n"
    assert page.read_text(encoding="utf-8").count("<article>") == 7
    missed = ["data", "show", str(built), "--out", str(tmp_path / "none.html"), "--containing", "no such words"]
    assert main(missed) == 2
    assert "contains 'no such words'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_codebook(built: Path, tmp_path: Path) -> None:
    target = tmp_path / "codes.safetensors"
    options = ["--num_codes", "16", "--patch_size", "8", "--out", str(target)]
    assert main(["data", "codebook", str(built), *options]) == 0
    codebook = load_codebook(target)
    assert (codebook.num_codes, codebook.patch_size) == (16, 8)
    assert codebook.manifest_digest == read_manifest(built).digest


def test_a_folder_that_holds_no_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "moevlm data build" in capsys.readouterr().err
    assert main(["data", "check", "pipe:touch PWNED"]) == 2
    assert "shell commands are not allowed" in capsys.readouterr().err


def test_the_command_line_itself_and_a_killed_build(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lightning_moevlm.cli.main",
        "data",
        "build",
        "scenes",
        "--out",
        str(tmp_path / "set"),
    ]
    with subprocess.Popen([*command, "--num_samples", "20000"], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".set.building-*/train-*.tar")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -9
    assert not (tmp_path / "set").exists()
    done = subprocess.run([*command, *SMALL], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("built ") and done.stderr == ""
    assert read_manifest(tmp_path / "set").num_samples("train") > 40


def test_importing_the_commands_is_cheap() -> None:
    code = (
        "import sys, lightning_moevlm.cli.data.commands; "
        "heavy = {'torch', 'lightning', 'mlflow', 'sklearn', 'matplotlib', 'numpy', 'emoji'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
