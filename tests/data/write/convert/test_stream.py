"""Converting tables of any length: the bytes are those of always, and memory does not grow with the rows."""

import hashlib
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from lightning_moevlm.data.write.convert.convert import ConvertOptions, Licence, SetOptions, convert
from lightning_moevlm.data.write.convert.shard_image import ImageOptions
from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, JsonlSource
from tests.data.sources import caption

LICENCE = Licence("CC BY 4.0", "", "")
GOLDEN = "35d000debd3d9277fe3e39b34c3050883500b58bd6dd3fda7b6bf2bf5bbbdaa0"
"""Sha256 over the shards' sha256, as the converter that held all rows in memory wrote them."""


def plain_png(number: int) -> bytes:
    """An 8 x 8 image whose bytes depend on no library: grey pixels, stored without compression."""
    lines = b"".join(
        b"\0" + bytes((number * 7 + row * 13 + column * 5) % 256 for column in range(8)) for row in range(8)
    )
    deflated = b"\x78\x01\x01" + struct.pack("<HH", len(lines), len(lines) ^ 0xFFFF) + lines
    deflated += struct.pack(">I", zlib.adler32(lines))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    text = chunk(b"tEXt", b"number\0" + str(number).encode())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + chunk(b"IDAT", deflated) + chunk(b"IEND", b"")


def _table(folder: Path, num_rows: int) -> Path:
    """Rows with and without notes, some images twice, one without an image and one of a key that came before."""
    rows: list[dict[str, object]] = []
    for i in range(num_rows):
        (folder / f"{i}.png").write_bytes(plain_png(i - i % 10 if i % 10 == 9 else i))
        about: dict[str, object] = {"note": f"é{i}", "boxes": [i, 2.5]} if i % 3 == 0 else {}
        rows.append({"image": f"{i}.png", "caption": f" {caption(i)} ", "id": f"key-{i * 37 % 101:03d}", **about})
    rows += [{"image": "none.png", "caption": "nothing", "id": "none"}, {**rows[0], "caption": "again"}]
    table = folder / "rows.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return table


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_bytes_are_those_of_always(tmp_path: Path, jobs: int) -> None:
    source = JsonlSource(_table(tmp_path, 100), None, None, Columns("image", "caption", "id", None))
    form = SetOptions(ImageOptions("png", None), 7, 300)
    converted = convert(source, tmp_path / "set", LICENCE, form, ConvertOptions(2, jobs, False))
    splits = converted.manifest.splits
    assert {split: [entry.num_samples for entry in entries] for split, entries in splits.items()} == {
        "train": [7] * 11 + [5],
        "val": [7],
        "test": [7, 4],
    }
    printed = json.dumps([[entry.file, entry.sha256] for entries in splits.values() for entry in entries])
    assert hashlib.sha256(printed.encode()).hexdigest() == GOLDEN
    assert [(count.cause, count.first.place) for count in converted.left_out] == [
        ("duplicate_key", "rows.jsonl line 102"),
        ("image_missing", "rows.jsonl line 101"),
    ]


_MEASURED = """
import json, resource, sys
from pathlib import Path
from lightning_moevlm.data.write.convert.convert import Effort, Form, convert
from lightning_moevlm.data.write.convert.shard_image import Wish
from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, JsonlSource
from tests.data.write.convert.test_stream import LICENCE

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder, before = Path(sys.argv[1]), peak()
source = JsonlSource(folder / "rows.jsonl", None, None, Columns("image", "caption", None, None))
converted = convert(source, folder / "set", LICENCE, Form(Wish("png", None), 1000, 300), Effort(0, 1, False))
samples = sum(converted.manifest.num_samples(split) for split in converted.manifest.splits)
print(json.dumps([samples, before, peak() - before]))
"""


def _added_mib(folder: Path, num_rows: int) -> float:
    """Convert rows of about a kilobyte in a process of its own; return how much its memory grew, in MiB."""
    folder.mkdir()
    for i in range(50):
        (folder / f"{i}.png").write_bytes(plain_png(i))
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            row = {"image": f"{i % 50}.png", "caption": caption(i), "page": f"{i} {'x' * 700}"}
            file.write(json.dumps(row) + "\n")
    done = subprocess.run([sys.executable, "-c", _MEASURED, str(folder)], capture_output=True, text=True, check=True)
    samples, before, added = json.loads(done.stdout.splitlines()[-1])
    assert samples == num_rows
    print(f"{num_rows:,} rows: {before:.0f} MiB before, {added:.0f} MiB more at the peak")
    return float(added)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    # 100,000 rows of a kilobyte are 100 MiB as text alone
    few, many = _added_mib(tmp_path / "few", 10_000), _added_mib(tmp_path / "many", 100_000)
    assert many < few + 40, (few, many)
