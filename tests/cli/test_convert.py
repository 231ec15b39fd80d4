"""`moevlm data convert` as a user types it: its output, a kill in the middle, training on the set."""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lightning_moevlm.cli.data.convert import COMMANDS
from lightning_moevlm.cli.main import main
from lightning_moevlm.data.format.manifest import read_manifest
from lightning_moevlm.study.run.processes.child_process import is_alive
from tests.conftest import PROJECT
from tests.data.benchmarks import SOURCES, karpathy_source
from tests.data.sources import (
    caption,
    coco_source,
    csv_source,
    img2dataset_source,
    jsonl_source,
    make_image,
    vqa_source,
    write_csv,
)
from tests.small_run import BACKBONE, SMALL
from tests.waiting import wait_for

TERMS = ("--licence", "CC BY 4.0", "--vocab_size", "400", "--jobs", "1")


def test_the_kinds_that_there_are() -> None:
    own, tables = {"questions", "statements"}, {"csv", "jsonl", "img2dataset"}
    benchmarks = {"coco_captions", "karpathy", "coco_vqa", "gqa", "okvqa", "textvqa", "nlvr2"}
    assert set(COMMANDS) == own | tables | benchmarks | {"llava"}


def source_of(kind: str, folder: Path) -> list[str]:
    """Make a source and return the arguments that name it."""
    if kind == "csv":
        return [str(csv_source(folder, 60)), "--images", str(folder / "images")]
    if kind == "jsonl":
        return [str(jsonl_source(folder, 60))]
    if kind == "coco_captions":
        return [str(coco_source(folder, 60)), "--captions", "each"]
    if kind == "karpathy":
        return [str(karpathy_source(folder))]
    coco_source(folder, 60)
    return [str(path) for path in vqa_source(folder, 60)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "coco_captions", "coco_vqa", "karpathy"])
def test_every_kind_trains_a_step(kind: str, moevlm: Callable[..., str], workplace: Path) -> None:
    folder = workplace / "mine"
    folder.mkdir()
    moevlm("data", "convert", kind, *source_of(kind, folder), *TERMS, "--out=set")
    moevlm("data", "check", "set")
    moevlm("fit", *SMALL, "--trainer.fast_dev_run=true", "--data.root=set", "--data.batch_size=4")


@pytest.mark.parametrize("kind", SOURCES)
def test_every_folder_of_a_benchmark_is_read(kind: str, tmp_path: Path) -> None:
    SOURCES[kind](tmp_path)
    out = str(tmp_path / "set")
    assert main(["data", "convert", kind, str(tmp_path), *TERMS, "--out", out]) == 0
    assert main(["data", "check", out]) == 0


def test_img2dataset_trains_a_step_with_its_configuration(moevlm: Callable[..., str], workplace: Path) -> None:
    config = "conf/data/img2dataset.yaml"
    text = (PROJECT / config).read_text(encoding="utf-8")
    img2dataset_source(workplace / "downloads", 3, 16)
    for command in re.findall(r"^#   moevlm (data .*)$", text, flags=re.MULTILINE):
        moevlm(*shlex.split(command), "--jobs=1")
    assert f"moevlm fit -c conf/quickstart.yaml -c {config}" in text
    small = ("--data.batch_size=4", f"{BACKBONE}.dim=16", f"{BACKBONE}.num_heads=2", f"{BACKBONE}.hidden_dim=32")
    moevlm("fit", "-c", "conf/quickstart.yaml", "-c", config, "--trainer.fast_dev_run=true", *small)


def test_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "convert", "csv", *source_of("csv", tmp_path), *TERMS, "--out", str(tmp_path / "set")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"converted {tmp_path / 'set'} (") and printed.err == ""
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("already built, nothing to do:")


def test_bad_rows_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "convert", "csv", *source_of("csv", tmp_path), *TERMS, "--out", str(tmp_path / "set")]
    with (tmp_path / "captions.csv").open("a") as file:
        file.write("gone.jpg,words,\r\n0/1.jpg,,\r\n0/1.jpg,,\r\n")
    assert main(arguments) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "caption_empty │ 2 │ captions.csv line 63: caption is empty" in printed
    assert "--max_bad 2" in printed  # the table is read first; the missing image is not looked for
    assert main([*arguments, "--max_bad", "2"]) == 2
    assert "image_missing │ 1 │ captions.csv line 62: image 'gone.jpg'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "set").exists()
    assert main([*arguments, "--max_bad", "3"]) == 0
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--licence", "null"], "--licence is missing"),
        (["--image_column", "photo"], "no column 'photo' (it has: image, caption, page)"),
        (["--image_column", "null", "--caption_column", "null"], "neither images nor captions"),
        (["--vocab_size", "100"], "vocab_size is 100"),
        (["--samples_per_shard", "0"], "samples_per_shard is 0"),
        (["--max_side", "2"], "max_side is 2"),
        (["--jobs", "0"], "jobs is 0"),
        (["--max_bad=-1"], "max_bad is -1"),
        (["--delimiter", "ab"], "delimiter is 'ab'"),
        (["--images", "none"], "--images none: there is no such folder"),
    ],
)
def test_bad_arguments_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    arguments = ["data", "convert", "csv", *source_of("csv", tmp_path), *TERMS, "--out", str(tmp_path / "set")]
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.csv", "images"]


def test_a_full_disk_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(task: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_moevlm.data.write.convert.convert.write_shard", no_room)
    arguments = ["data", "convert", "csv", *source_of("csv", tmp_path), *TERMS, "--out", str(tmp_path / "set")]
    assert main(arguments) == 2
    assert "could not be written (No space left on device)" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(arguments) == 0


@pytest.mark.slow
def test_killed_twice_and_gone_on_with(tmp_path: Path) -> None:
    # eight large PNGs, each named by many rows: slow to look at and slow to encode anew, so there is time to kill
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(make_image(i, "png", (250, 250)))
    rows = [[f"{i % 8}.png", caption(i % 512), ("train", "val", "test")[max(0, i - 597)]] for i in range(600)]
    table = write_csv(tmp_path / "t.csv", ["image", "caption", "split"], rows)
    arguments = [str(table), *TERMS, "--split_column=split", "--samples_per_shard=20", "--max_side=64", "--jobs=2"]

    def convert(out: str) -> list[str]:
        return [sys.executable, "-m", "lightning_moevlm", "data", "convert", "csv", *arguments, "--out", out]

    out = str(tmp_path / "set")
    kill_when(convert(out), tmp_path, "journal/look-*.json", at_least=1)
    (looked,) = tmp_path.glob(".set.converting-*/journal/look-000000.json")
    first_look = looked.stat().st_mtime_ns
    kill_when(convert(out), tmp_path, "journal/train-*.json", at_least=3)
    assert looked.stat().st_mtime_ns == first_look  # what had been looked at was not looked at again
    (work_folder,) = tmp_path.glob(".set.converting-*")
    kept, damaged = ((work_folder / f"train-{i:06d}.tar") for i in (0, 1))
    damaged.write_bytes(b"not what was written")
    written = kept.stat().st_mtime_ns
    subprocess.run(convert(out), check=True, timeout=120, capture_output=True)
    assert (tmp_path / "set/train-000000.tar").stat().st_mtime_ns == written
    subprocess.run(convert(str(tmp_path / "whole")), check=True, timeout=120, capture_output=True)
    sets = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("set", "whole")]
    assert sets[0] == sets[1] and read_manifest(tmp_path / "set").num_samples("train") == 598
    assert not list(tmp_path.glob(".*"))


def kill_when(command: list[str], folder: Path, pattern: str, at_least: int) -> None:
    """Kill a conversion with -9 as soon as so many files are there; its own processes end with it."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(list(folder.glob(f".set.converting-*/{pattern}"))) < at_least:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert process.returncode == -9
    assert len(children) >= 2
    wait_for(lambda: not any(map(is_alive, children)))
    assert not (folder / "set").exists()
