"""Shards that are broken in every way we know of: what is lost is counted by its cause, what is whole is read."""

import gzip
import io
import tarfile
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from random import Random

import pytest
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from lightning_moevlm.data.format.faults import Lost
from lightning_moevlm.data.format.manifest import ShardEntry, file_sha256, read_manifest
from lightning_moevlm.data.format.sample_groups import key_and_extension
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.storage.shard_storage import ShardStorage

WANTED = frozenset({"jpg", "txt"})
Files = list[tuple[str, bytes]]
SAMPLES = 6


def _files(num_samples: int = SAMPLES) -> Files:
    """Samples of three members each; images of 700 bytes fill two blocks, the others one."""
    return [
        (f"s{i}.{extension}", bytes([65 + i]) * size)
        for i in range(num_samples)
        for extension, size in (("jpg", 700), ("json", 20), ("txt", 30))
    ]


def _tar(files: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


BLOCKS_PER_SAMPLE = 3 + 2 + 2  # a header and the data of each member
SAMPLE_BYTES = BLOCKS_PER_SAMPLE * 512


def _read(folder: Path, data: bytes, num_samples: int = SAMPLES) -> list[RawSample | Lost]:
    """Read a shard whose manifest was made of these very bytes."""
    path = folder / "x.tar"
    path.write_bytes(data)
    entry = ShardEntry("x.tar", num_samples, len(data), file_sha256(path))
    return list(read_shard(ShardStorage(str(folder)), entry, WANTED))


def _shown(found: list[RawSample | Lost]) -> list[str | tuple[int, str]]:
    return [item.key if isinstance(item, RawSample) else item[:2] for item in found]


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


WHOLE = _tar(_files())
KEYS = [f"s{i}" for i in range(SAMPLES)]
SECOND = SAMPLE_BYTES  # where the second sample begins


def test_a_whole_shard(tmp_path: Path) -> None:
    found = _read(tmp_path, WHOLE)
    assert found == [
        RawSample(f"s{i}", "x.tar", {"jpg": bytes([65 + i]) * 700, "txt": bytes([65 + i]) * 30}) for i in range(SAMPLES)
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # what a manifest that was made of the broken file cannot tell
        (WHOLE[: SECOND + 600], ["s0", (5, "shard_truncated")]),  # within the image of s1
        (WHOLE[: SECOND + 300], ["s0", (5, "shard_truncated")]),  # within its header
        (WHOLE[:SECOND], ["s0", (5, "shard_truncated")]),  # between two samples: no end mark follows
        (WHOLE[: SECOND + 3 * 512], ["s0", (5, "shard_truncated")]),  # between two members of s1
        (WHOLE[: SAMPLES * SAMPLE_BYTES], KEYS),  # only the end mark is gone: nothing is lost
        (b"", [(6, "shard_truncated")]),
        (WHOLE[:100], [(6, "shard_truncated")]),
        (_tar([]), [(6, "sample_count")]),
        (_flipped(WHOLE, 3), [(6, "shard_corrupt")]),  # the very first header
        (_flipped(WHOLE, SECOND + 3), ["s0", (5, "shard_corrupt")]),  # the name of s1.jpg: WebDataset ends silently
        (_flipped(WHOLE, SECOND + 3 * 512 + 3), ["s0", (5, "shard_corrupt")]),  # s1.json; s1 has no text by then
        (WHOLE[:SECOND] + bytes(1024) + WHOLE[SECOND:], ["s0", (5, "shard_corrupt")]),  # an end mark in the middle
        (WHOLE[:SECOND] + b"\1" + WHOLE[SECOND:], ["s0", (5, "shard_corrupt")]),
        (b"no tar at all" * 500, [(6, "shard_corrupt")]),
        (gzip.compress(WHOLE), [(6, "shard_truncated")]),  # shorter than a header
        (gzip.compress(Random(0).randbytes(5000) + WHOLE), [(6, "shard_corrupt")]),
        (_tar(_files(4)), ["s0", "s1", "s2", "s3", (2, "sample_count")]),
        (_tar(_files(8)), [*KEYS, (0, "sample_count")]),
        (_tar(_files(3) + _files(3)), ["s0", "s1", "s2", *[(1, "duplicate_key")] * 3]),
        (_tar(_files(5) + _files(5)[-3:]), [*KEYS[:5], (1, "duplicate_key")]),  # one right after the other
        (_tar(f for f in _files() if f[0] != "s2.txt"), ["s0", "s1", (1, "member_missing"), *KEYS[3:]]),
        (_tar(f for f in _files() if f[0] not in ("s2.jpg", "s2.txt")), [*KEYS[:2], *KEYS[3:], (1, "member_missing")]),
        (_tar([*_files(3), ("README.md", b"hello"), ("noextension", b"x"), *_files()[9:]]), KEYS),
    ],
    ids=count(),
)  # fmt: skip
def test_losses_of_a_broken_shard_with_a_matching_manifest(
    tmp_path: Path, data: bytes, expected: list[str | tuple[int, str]]
) -> None:
    found = _read(tmp_path, data)
    assert _shown(found) == expected
    whole = {f"s{i}": {"jpg": bytes([65 + i]) * 700, "txt": bytes([65 + i]) * 30} for i in range(8)}
    for item in found:
        if isinstance(item, RawSample):
            assert item.members == whole[item.key]
        else:
            assert "x.tar" in item.message and "\n" not in item.message


@pytest.mark.parametrize(
    ("damage", "cause", "message"),
    [
        (lambda data: None, "shard_missing", "is missing"),
        (lambda data: b"", "shard_truncated", "0 bytes, its manifest says"),
        (lambda data: data[:-512], "shard_truncated", "is truncated"),
        (lambda data: data + bytes(512), "shard_altered", "longer than it should be"),
        (lambda data: _flipped(data, 3), "shard_altered", "not the one of its manifest"),
        (lambda data: _flipped(data, 600), "shard_altered", "not the one of its manifest"),
    ],
)
def test_a_shard_that_is_not_the_manifests_is_lost_as_a_whole(
    tmp_path: Path, damage: Callable[[bytes], bytes | None], cause: str, message: str
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(WHOLE)
    entry = ShardEntry("x.tar", SAMPLES, len(WHOLE), file_sha256(path))
    damaged = damage(WHOLE)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    (lost,) = read_shard(ShardStorage(str(tmp_path)), entry, WANTED)
    assert isinstance(lost, Lost) and lost[:2] == (SAMPLES, cause)
    assert message in lost.message and str(path) in lost.message


def _with_header(change: Callable[[tarfile.TarInfo], None], at: int = 1, data: bytes = b"") -> bytes:
    """A tar in which a changed header, with the checksum of a good one, stands before sample number `at`."""
    info = tarfile.TarInfo("evil.jpg")
    change(info)
    header = info.tobuf(tarfile.GNU_FORMAT)
    begin = at * SAMPLE_BYTES
    return WHOLE[:begin] + header + data + bytes(-len(data) % 512) + WHOLE[begin:]


def _set(**values: object) -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        for name, value in values.items():
            setattr(info, name, value)

    return change


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # a negative size sends tarfile backwards, for ever (CVE-2025-8194)
        (_with_header(_set(size=-(SECOND + 512))), ["s0", (5, "shard_corrupt")]),
        (_with_header(_set(size=-512)), ["s0", (5, "shard_corrupt")]),
        (_with_header(_set(size=2**62)), ["s0", (5, "shard_truncated")]),
        # sparse: 512 bytes that say they are 2^40
        (_with_header(_set(type=tarfile.GNUTYPE_SPARSE)), KEYS),
        (_with_header(_set(type=tarfile.SYMTYPE, linkname="/etc/passwd")), KEYS),
        (_with_header(_set(type=tarfile.LNKTYPE, linkname="s0.jpg")), KEYS),
        (_with_header(_set(type=tarfile.DIRTYPE, name="folder")), KEYS),
        (_with_header(_set(type=tarfile.FIFOTYPE, name="evil.jpg")), KEYS),
        # a global header that gives every member the size of the whole file: reading would be quadratic
        (_with_header(_set(type=tarfile.XGLTYPE, size=16), data=b"16 size=9999999\n"), ["s0", (5, "shard_corrupt")]),
        # extended headers one after the other: tarfile follows them by recursion
        (WHOLE[:SECOND] + _with_header(_set(type=tarfile.XHDTYPE), 0)[:512] * 5000 + WHOLE[SECOND:],
         ["s0", (5, "shard_corrupt")]),
        (_with_header(_set(type=tarfile.XHDTYPE, size=3000)), ["s0", (5, "shard_corrupt")]),
    ],
)  # fmt: skip
def test_headers_that_would_harm_a_trusting_reader(
    tmp_path: Path, data: bytes, expected: list[str | tuple[int, str]]
) -> None:
    assert _shown(_read(tmp_path, data)) == expected


def test_names_are_never_paths_or_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_inside = tmp_path / "inside"
    resolve_inside.mkdir()
    monkeypatch.chdir(resolve_inside)
    files = [
        ("../../escaped.jpg", b"1"), ("../../escaped.txt", b"1"),
        ("/etc/moevlm.jpg", b"2"), ("/etc/moevlm.txt", b"2"),
        ("\x1b[31mred\n.jpg", b"3"), ("\x1b[31mred\n.txt", b"3"),
        ("evil.jpg", b"4"), ("evil.txt", b"4"), ("evil.pkl", b"cos\nsystem\n(S'touch PWNED'\ntR."),
    ]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    found = _read(resolve_inside, _tar(files), 4)
    assert [item.members for item in found if isinstance(item, RawSample)] == [
        {"jpg": digit, "txt": digit} for digit in (b"1", b"2", b"3", b"4")
    ]
    assert [item.key for item in found if isinstance(item, RawSample)][2] == "\\x1b[31mred\\n"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, resolve_inside / "x.tar"])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_shards_give_the_samples_of_webdataset(tmp_path: Path, format: int) -> None:
    long = "folder/" + "n" * 90 + "/" + "m" * 60
    files = [
        *_files(3), ("a.b.jpg", b"two dots"), ("a.txt", b"x"), (f"{long}.JPG", b"long"), (f"{long}.Txt", b"name"),
        ("__meta__", b"passed over"), ("ümläut.jpg", b"u"), ("ümläut.txt", b"u"),
        ("./dot/c.jpg", b"c"), ("./dot/c.txt", b"c"),
    ]  # fmt: skip
    data = _tar(files, format)
    expander = tar_file_expander([{"url": "x", "stream": io.BytesIO(data)}])
    expected = [
        (sample["__key__"], {name: value for name, value in sample.items() if name in WANTED})
        for sample in group_by_keys(expander)
        if sample.keys() >= WANTED
    ]
    found = _read(tmp_path, data, len(expected) + 1)
    assert [(item.key, item.members) for item in found if isinstance(item, RawSample)] == expected
    assert len(expected) == 6 and _shown(found)[3] == (1, "member_missing")  # a.b.jpg is the member b.jpg of a


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "b/a.jpg",
        "v1.0.7.jpg",
        "b.c/a.d.txt",
        "b.c/a",
        "a",
        "a.",
        "./b/a.txt",
        "/a.txt",
        "b/",
        "__a__.txt",
        "ä/ö.ü",
    ],
)
def test_names_are_cut_where_webdataset_cuts_them(name: str) -> None:
    assert key_and_extension(name) == tuple(part or "" for part in base_plus_ext(name))


@pytest.mark.parametrize("name", [".DS_Store", "._a.jpg", "b/._a.jpg", "__MACOSX/b/._a.jpg"])
def test_hidden_files_belong_to_no_sample(name: str) -> None:
    assert key_and_extension(name) == ("", "")


def test_an_unwanted_member_that_comes_again_begins_a_sample(tmp_path: Path) -> None:
    # so that every reading of a shard counts the same samples, whatever it wants of them
    files = [("a.jpg", b"1"), ("a.txt", b"1"), ("a.json", b"1"), ("a.json", b"2"), ("b.jpg", b"3"), ("b.txt", b"3")]
    data = _tar(files)
    assert _shown(_read(tmp_path, data, 3)) == ["a", "b", (1, "member_missing")]


def _open_files() -> set[Path]:
    return {fd.resolve() for fd in Path("/proc/self/fd").iterdir()}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux to list open files")
def test_a_reader_that_stops_early_closes_the_file(scenes_root: Path) -> None:
    entry = read_manifest(scenes_root).splits["train"][0]
    samples = read_shard(ShardStorage(str(scenes_root)), entry, WANTED)
    next(samples)
    assert (scenes_root / entry.file).resolve() in _open_files()
    samples.close()  # type: ignore[attr-defined]
    assert (scenes_root / entry.file).resolve() not in _open_files()


def test_nothing_promised_and_nothing_wanted(tmp_path: Path) -> None:
    assert _shown(_read(tmp_path, _tar([]), 0)) == []
    assert _shown(_read(tmp_path, WHOLE, 0)) == [(0, "sample_count")]
    entry = ShardEntry("x.tar", SAMPLES, len(WHOLE), file_sha256(tmp_path / "x.tar"))
    assert _shown(list(read_shard(ShardStorage(str(tmp_path)), entry, frozenset()))) == KEYS
