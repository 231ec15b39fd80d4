"""Unpacks compressed tars before a conversion, because readers of shards seek within a tar.

`00000.tar` with gzip content, `00000.tar.gz` and `00000.tgz` become plain tars in a hidden folder beside the set. Tars
already unpacked stay there until the conversion is done.
"""

import bz2
import gzip
import lzma
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track

_MARKS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_NAMES = ("*.tar", "*.tar.gz", "*.tgz", "*.tar.bz2", "*.tar.xz")


def detect_compression(path: Path) -> str | None:
    """Return the compression of a file, by its bytes; None if it has none."""
    with path.open("rb") as file:
        start = file.read(6)
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)


def find_compressed_tars(folder: Path) -> list[Path]:
    """Return the compressed tars of a folder, under any usual name."""
    found = {path for pattern in _NAMES for path in folder.glob(pattern) if not path.name.startswith(".")}
    return sorted(path for path in found if path.is_file() and detect_compression(path) is not None)


def refuse_compressed(folder: Path) -> None:
    """Refuse a folder with compressed tars.

    Raises:
        UserError: with the remedy.
    """
    found = find_compressed_tars(folder)
    if found:
        raise UserError(
            f"{found[0]} is compressed ({detect_compression(found[0])}), and readers of shards need plain tars "
            f"({len(found)} are compressed): unpack them, or add --recompress true"
        )


@contextmanager
def unpack_tars(folder: Path, out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` with the same tars, unpacked, and their statistics; remove it at the end.

    Raises:
        UserError: if a tar is broken, or `out` is the folder itself.
    """
    if out.resolve() == folder.resolve():
        raise UserError(f"--out is {folder} itself, but unpacked tars need another folder; give another --out")
    target = out.parent / f".{out.name}.unpacked"
    target.mkdir(parents=True, exist_ok=True)
    try:
        compressed = find_compressed_tars(folder)
        for path in track(compressed, len(compressed), "unpacking tars"):
            _unpack(path, target / f"{path.name.partition('.tar')[0].removesuffix('.tgz')}.tar")
        for path in {*folder.glob("*.tar"), *folder.glob("*_stats.json")} - set(compressed):
            _link(path, target / path.name)
        yield target
    except UserError:
        shutil.rmtree(target)  # a tar may have to be corrected
        raise
    shutil.rmtree(target)


def _unpack(path: Path, target: Path) -> None:
    if target.exists():
        return
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        with _open(path) as packed, unfinished.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 2**20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is broken ({error}); download it again, or move it away") from None
    unfinished.replace(target)


def _open(path: Path) -> gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    name = detect_compression(path)
    return gzip.GzipFile(path) if name == "gzip" else bz2.BZ2File(path) if name == "bzip2" else lzma.LZMAFile(path)


def _link(path: Path, target: Path) -> None:
    if not target.exists():
        try:
            os.link(path.resolve(), target)
        except OSError:
            shutil.copyfile(path, target)
