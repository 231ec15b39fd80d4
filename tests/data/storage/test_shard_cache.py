"""The cache of remote shards: bounded, shared by processes, and never with half a file in it."""

import hashlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.faults import ShardFault
from lightning_moevlm.data.format.manifest import ShardEntry, file_sha256, read_manifest
from lightning_moevlm.data.storage.shard_cache import ShardCache
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from tests.data.unsteady_server import Unsteady, serve


def _entry(folder: Path, name: str, data: bytes) -> ShardEntry:
    (folder / name).write_bytes(data)
    return ShardEntry(name, 1, len(data), file_sha256(folder / name))


def _writes(data: bytes, calls: list[bytes]) -> Callable[[BinaryIO], None]:
    def download(out: BinaryIO) -> None:
        calls.append(data)
        out.write(data)

    return download


def _files(cache: ShardCache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if path.suffix != ".lock")


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    # room for 3 shards of 1000 bytes: a, b, c fill it; a is used again, so d drives out b
    cache = ShardCache(tmp_path / "cache", 3000)
    calls: list[bytes] = []
    found = {}
    for number, name in enumerate("abcad"):
        data = name.encode() * 1000
        found[name] = cache.path(f"http://x/{name}.tar", _entry(tmp_path, name, data), _writes(data, calls))
        os.utime(found[name], (number, number))  # clocks of file systems may be coarser than this test
    assert [data[:1] for data in calls] == [b"a", b"b", b"c", b"d"]
    assert _files(cache) == sorted(found[name] for name in "acd")
    assert sum(path.stat().st_size for path in _files(cache)) == 3000


def test_a_shard_larger_than_the_cache_is_kept_alone(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 500)
    for name in "ab":
        path = cache.path(
            f"s3://x/{name}", _entry(tmp_path, name, name.encode() * 1000), _writes(name.encode() * 1000, [])
        )
        assert _files(cache) == [path]


def test_unbounded(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", None)
    for name in "abc":
        cache.path(f"s3://x/{name}", _entry(tmp_path, name, name.encode() * 1000), _writes(name.encode() * 1000, []))
    assert len(_files(cache)) == 3


def test_sets_do_not_mix(tmp_path: Path) -> None:
    # WebDataset's cache names files by the last part of the address alone: /one/x.tar and /two/x.tar are one to it
    cache = ShardCache(tmp_path / "cache", None)
    one, two = _entry(tmp_path, "x.tar", b"one"), _entry(tmp_path, "x.tar", b"two")
    for address, entry, data in (("http://h/one/x.tar", one, b"one"), ("http://h/two/x.tar", two, b"two")):
        assert cache.path(address, entry, _writes(data, [])).read_bytes() == data
    # and a set that was built anew at the same address is fetched anew
    assert cache.path("http://h/one/x.tar", two, _writes(b"two", [])).read_bytes() == b"two"
    assert len(_files(cache)) == 3


def test_a_file_that_decayed_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    cache, calls = ShardCache(tmp_path / "cache", None), list[bytes]()
    entry = _entry(tmp_path, "x", b"good" * 100)
    path = cache.path("http://h/x", entry, _writes(b"good" * 100, calls))
    path.write_bytes(b"evil" * 100)
    assert cache.path("http://h/x", entry, _writes(b"good" * 100, calls)).read_bytes() == b"good" * 100
    assert len(calls) == 2


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", None)
    entry = _entry(tmp_path, "x", b"x" * 1000)

    def breaks(out: BinaryIO) -> None:
        out.write(b"x" * 500)
        raise ShardFault("shard_unreachable", "gone")

    with pytest.raises(ShardFault, match="gone"):
        cache.path("http://h/x", entry, breaks)
    assert _files(cache) == []
    with pytest.raises(ShardFault, match="not the one of its manifest"):
        cache.path("http://h/x", entry, _writes(b"y" * 1000, []))
    assert _files(cache) == []


def _dies_in_the_middle(folder: Path, entry: ShardEntry) -> None:
    def dies(out: BinaryIO) -> None:
        out.write(b"x" * 500)
        out.flush()
        os._exit(9)

    ShardCache(folder, 2500).path("http://h/x", entry, dies)


def test_partial_files_of_a_killed_process_are_neither_used_nor_kept(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 2500)
    entry = _entry(tmp_path, "x", b"x" * 1000)
    for _ in range(2):
        victim = multiprocessing.get_context("fork").Process(target=_dies_in_the_middle, args=(cache.folder, entry))
        victim.start()
        victim.join()
        assert victim.exitcode == 9
        (left,) = _files(cache)
        assert left.suffix == ".partial" and left.stat().st_size == 1000
    # another shard sweeps it out, though its 1000 bytes would have had room beside 1500
    other = cache.path("http://h/y", _entry(tmp_path, "y", b"y" * 1500), _writes(b"y" * 1500, []))
    assert _files(cache) == [other]
    assert cache.path("http://h/x", entry, _writes(b"x" * 1000, [])).read_bytes() == b"x" * 1000


def _reads_all(root: str, folder: str, first: int, results: "multiprocessing.Queue[list[str]]") -> None:
    # a cache of two shards for eight: the processes drive out each other's files all the time
    storage = ShardStorage(root, folder, cache_gib=200_000 / 2**30, backoff_s=0.001)
    entries = storage.read_manifest().splits["train"]
    hashes = []
    for entry in (*entries[first:], *entries[:first]) * 2:
        with storage.open(entry) as stream:
            hashes.append(hashlib.sha256(stream.read()).hexdigest())
    results.put(hashes)


def test_processes_that_share_a_tiny_cache(scenes_root: Path, tmp_path: Path) -> None:
    entries = read_manifest(scenes_root).splits["train"]
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[list[str]] = context.Queue()
    with serve(Unsteady(scenes_root, drops=5, busy=5)) as server:
        readers = [
            context.Process(target=_reads_all, args=(server.url, str(tmp_path), first, results)) for first in (0, 0, 3)
        ]
        for reader in readers:
            reader.start()
        found = sorted(results.get(timeout=60) for _ in readers)
        for reader in readers:
            reader.join()
        fetched = len(server.asked)
        storage = ShardStorage(server.url, str(tmp_path), cache_gib=200_000 / 2**30)
        for entry in entries:
            storage.local_path(entry)
        assert len(server.asked) > fetched
    expected = [entry.sha256 for entry in entries]
    assert found == sorted([expected * 2, expected * 2, (expected[3:] + expected[:3]) * 2])
    left = [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert all(path.suffix == ".tar" for path in left)
    assert sum(path.stat().st_size for path in left) <= 200_000


def test_processes_that_want_the_same_shard_download_it_once(scenes_root: Path, tmp_path: Path) -> None:
    entry = read_manifest(scenes_root).splits["train"][0]
    with serve(Unsteady(scenes_root)) as server:
        context = multiprocessing.get_context("fork")
        readers = [
            context.Process(target=ShardStorage(server.url, str(tmp_path)).local_path, args=(entry,)) for _ in range(4)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert [reader.exitcode for reader in readers] == [0, 0, 0, 0]
        assert len(server.find_downloads(entry.file)) == 1


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = ShardCache(tmp_path / "file" / "cache", None)
    with pytest.raises(UserError, match=r"set data.cache_dir to a folder with space"):
        cache.path("http://h/x", replace(_entry(tmp_path, "x", b"x")), _writes(b"x", []))
