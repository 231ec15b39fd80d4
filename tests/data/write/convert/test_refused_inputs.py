"""Compressed tars and addresses: refused with a remedy, or unpacked."""

import gzip
import lzma
import re
from pathlib import Path

import pytest

from lightning_moevlm.cli.main import main
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from tests.data.found_tars import (
    folder_of,
    three_tars,
)


def test_compressed_tars_are_refused_or_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "in", *three_tars())
    (folder / "part-1.tar").write_bytes(gzip.compress((folder / "part-1.tar").read_bytes()))
    (folder / "part-2.tar.xz").write_bytes(lzma.compress((folder / "part-2.tar").read_bytes()))
    (folder / "part-2.tar").unlink()
    convert_them = [
        "data",
        "convert",
        "img2dataset",
        str(folder),
        "--licence=X",
        "--vocab_size=400",
        "--jobs=1",
        "--out",
    ]
    assert main([*convert_them, str(tmp_path / "set")]) == 2
    assert "part-1.tar is compressed (gzip)" in (said := capsys.readouterr().err) and "--recompress true" in said

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("shutil.copyfileobj", no_room)
        assert main([*convert_them, str(tmp_path / "true"), "--recompress=true"]) == 2
    assert "could not be written (No space left on device)" in capsys.readouterr().err
    for kept in ("true", "false"):
        out = tmp_path / kept
        assert main([*convert_them, str(out), "--recompress=true", f"--keep_tars={kept}"]) == 0
        assert "60 rows read, 60 of them good, 0 bad" in capsys.readouterr().out
        assert check_set(ShardStorage(str(out))).problems == ()
    (folder / "part-1.tar").write_bytes((folder / "part-1.tar").read_bytes()[:2000])
    assert main([*convert_them, str(tmp_path / "broken"), "--recompress=true"]) == 2
    assert "part-1.tar is broken (Compressed file ended" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["false", "in", "true"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["img2dataset", "s3://bucket/set"],
            "folder s3://bucket/set is an address, .*`aws s3 sync s3://bucket/set FOLDER`",
        ),
        (["csv", "https://me:secret@host/t.csv"], r"table https://\*\*\*@host/t.csv is an address, .*rclone copy"),
        (["coco_captions", "gs://bucket/c.json"], r"annotations gs://bucket/c.json is an address, .*gsutil"),
        (["img2dataset", ".", "--out", "s3://bucket/set"], "--out s3://bucket/set is an address, .*local folders only"),
    ],
)
def test_an_address_is_refused_with_a_command_that_copies_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder_of(tmp_path / "in", *three_tars(1)))
    assert main(["data", "convert", *arguments, "--licence=X"]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
