"""Sets on real servers that misbehave: every shard arrives whole or is lost by its cause, and no secret is shown."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.faults import Lost, ShardFault
from lightning_moevlm.data.format.manifest import ShardEntry, check_shard, read_manifest
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.storage.shard_storage import PROTOCOLS, ShardStorage
from tests.data.unsteady_server import Unsteady, serve

WANTED = frozenset({"jpg", "txt"})
FIRST = "train-000000.tar"


def _storage(root: str, cache: Path, **options: Any) -> ShardStorage:
    return ShardStorage(root, str(cache), **{"backoff_s": 0.001, "attempts": 3, **options})


def _train(storage: ShardStorage) -> list[RawSample | Lost]:
    return [
        sample for entry in storage.read_manifest().splits["train"] for sample in read_shard(storage, entry, WANTED)
    ]


@pytest.fixture
def local(scenes_root: Path) -> list[RawSample | Lost]:
    samples = _train(ShardStorage(str(scenes_root)))
    assert len(samples) == 120 and all(isinstance(sample, RawSample) for sample in samples)
    return samples


def test_a_shard_in_a_folder_is_hashed_once_and_again_when_it_was_touched(
    scenes_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(root: Path, entry: ShardEntry) -> Path:
        hashed.append(entry.file)
        return check_shard(root, entry)

    monkeypatch.setattr("lightning_moevlm.data.storage.shard_storage.check_shard", counted)
    storage, other = ShardStorage(str(scenes_copy)), ShardStorage(str(scenes_copy))
    entry, path = storage.read_manifest().splits["train"][0], scenes_copy / FIRST
    for _ in range(2):
        storage.open(entry).close()
    assert hashed == [FIRST]
    other.open(entry).close()
    storage.open(replace(entry, sha256=entry.sha256)).close()
    assert hashed == [FIRST] * 2, "another storage trusts nobody, an equal entry is the same"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times would leave it
    for _ in range(2):
        with pytest.raises(ShardFault, match="is not the one of its manifest") as caught:
            storage.open(entry)
        assert caught.value.cause == "shard_altered"
    data[600] ^= 1
    path.write_bytes(data)
    storage.open(entry).close()
    assert hashed == [FIRST] * 5


@pytest.mark.parametrize(
    "behaviour",
    [
        {},
        {"busy": 2},
        {"drops": 2},
        {"drops": 2, "ranges": False},
        {"drops": 2, "hide_length": True},
        {"drops": 2, "hide_length": True, "ranges": False},
        {"drops": 2, "busy": 2},
    ],
    ids=str,
)
def test_a_set_on_a_web_server_is_read_as_from_a_folder(
    scenes_root: Path, tmp_path: Path, local: list[RawSample | Lost], behaviour: dict[str, Any]
) -> None:
    with serve(Unsteady(scenes_root, **behaviour)) as server:
        storage = _storage(server.url, tmp_path)
        assert _train(storage) == local
        asked = len(server.asked)
        assert _train(storage) == local
        assert len(server.asked) == asked + 1, "all but the manifest should have come from the cache"
        assert server.drops == server.busy == 0, "the server did not misbehave as it should"


def test_a_download_resumes_where_the_connection_broke(scenes_root: Path, tmp_path: Path) -> None:
    entry = read_manifest(scenes_root).splits["train"][0]
    size = entry.num_bytes
    assert size > 30_000
    with serve(Unsteady(scenes_root, drops=2, drop_after=10_000)) as server:
        path = _storage(server.url, tmp_path).local_path(entry)
        assert path.read_bytes() == (scenes_root / FIRST).read_bytes()
        # what had arrived when the connection broke is not asked for again, up to what a buffer swallowed
        ranges = server.find_downloads(FIRST)
        assert len(ranges) == 3 and ranges[0] == ""
        starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in ranges[1:] if asked]
        assert starts == sorted(starts) and all(0 < start <= 20_000 for start in starts)


def test_a_server_that_stays_away(scenes_root: Path, tmp_path: Path) -> None:
    entry = read_manifest(scenes_root).splits["train"][0]
    with serve(Unsteady(scenes_root, busy=1000)) as server:
        (lost,) = read_shard(_storage(server.url, tmp_path), entry, WANTED)
        assert len(server.find_downloads(FIRST)) == 3
    assert isinstance(lost, Lost) and lost[:2] == (entry.num_samples, "shard_unreachable")
    assert f"{server.url}/{FIRST} did not answer 3 times in a row" in lost.message and "503" in lost.message
    (lost,) = read_shard(_storage(server.url, tmp_path), entry, WANTED)  # nobody listens any more
    assert isinstance(lost, Lost) and lost.cause == "shard_unreachable"


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda data: None, "shard_missing"),
        (lambda data: b"", "shard_truncated"),
        (lambda data: data[:-1024], "shard_truncated"),
        (lambda data: data + b"\0" * 512, "shard_altered"),
        (lambda data: data[:3000] + bytes([data[3000] ^ 1]) + data[3001:], "shard_altered"),
    ],
    ids=["missing", "empty", "truncated", "longer", "altered"],
)
def test_a_bad_shard_on_a_server_is_lost_by_its_cause_and_not_kept(
    scenes_copy: Path, tmp_path: Path, damage: Any, cause: str
) -> None:
    entry = read_manifest(scenes_copy).splits["train"][0]
    damaged = damage((scenes_copy / FIRST).read_bytes())
    (scenes_copy / FIRST).unlink() if damaged is None else (scenes_copy / FIRST).write_bytes(damaged)
    cache = tmp_path / "cache"
    with serve(Unsteady(scenes_copy)) as server:
        (lost,) = read_shard(_storage(server.url, cache), entry, WANTED)
        assert len(server.find_downloads(FIRST)) == 1, "a retry would not help"
    assert isinstance(lost, Lost)
    assert lost[:2] == (entry.num_samples, cause)
    assert f"{server.url}/{FIRST}" in lost.message
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_credentials_reach_the_server_but_no_message_and_no_file_name(
    scenes_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for logger in ("", "fsspec", "fsspec.http", "aiohttp.client", "asyncio"):
        caplog.set_level(logging.DEBUG, logger)
    entry = read_manifest(scenes_root).splits["train"][0]
    with serve(Unsteady(scenes_root, login="anna:s3cr3t-pass")) as server:
        host = server.url.removeprefix("http://")
        good = _storage(f"http://anna:s3cr3t-pass@{host}/?sig=s1gnature", tmp_path)
        assert good.read_manifest() == read_manifest(scenes_root)
        assert good.local_path(entry).is_file()
        bad = _storage(f"http://anna:wr0ng-pass@{host}/?sig=s1gnature", tmp_path / "other")
        with pytest.raises(UserError, match="refused") as refusal:
            bad.read_manifest()
        assert len(server.find_downloads("manifest.json?sig=s1gnature")) == 2, "a refusal is final"
        (lost,) = read_shard(bad, entry, WANTED)
    assert isinstance(lost, Lost) and lost.cause == "shard_unreachable"
    printed = [str(good), repr(good), str(bad), repr(bad), str(refusal.value), lost.message, caplog.text]
    printed += [str(path) for path in tmp_path.rglob("*")]
    assert "train-000000.tar?***" in caplog.text, "the driver should have logged what it asks for"
    for secret in ("s3cr3t", "wr0ng", "anna", "s1gnature"):
        assert not any(secret in text for text in printed)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("pipe:touch PWNED", "shell commands are not allowed"),
        ("| touch PWNED", "shell commands are not allowed"),
        ("PIPE://touch PWNED", "protocol 'pipe'|shell commands are not allowed"),
        ("ftp://x.org/set", "protocol 'ftp', but only file, http, https, s3, gs are allowed"),
        ("memory://set", "protocol 'memory'"),
        ("s3://bucket/set::pipe://x", "without chains"),
        ("zip://set.zip::http://x.org", "without chains"),
    ],
)
def test_invalid_storages_are_refused(root: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ShardStorage(root)


def test_a_protocol_can_be_allowed_by_name(scenes_root: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(scenes_root), "/scenes", recursive=True)
    storage = _storage("memory://scenes", tmp_path, allowed_protocols=("memory",))
    entry = storage.read_manifest().splits["train"][0]
    assert storage.local_path(entry).read_bytes() == (scenes_root / FIRST).read_bytes()
    with pytest.raises(UserError, match="only memory are allowed"):
        ShardStorage(str(scenes_root), allowed_protocols=("memory",))
    assert "file" in PROTOCOLS and ShardStorage(f"file://{scenes_root}").read_manifest() == read_manifest(scenes_root)


def test_a_missing_driver_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'lightning-moevlm\[gs\]'"):
        _storage("gs://bucket/set", tmp_path).read_manifest()


def test_an_unreadable_disk_is_not_a_missing_shard(scenes_root: Path, tmp_path: Path) -> None:
    entry = replace(read_manifest(scenes_root).splits["train"][0], file="x" * 300)  # longer than any file system takes
    (lost,) = read_shard(ShardStorage(str(scenes_root)), entry, WANTED)
    assert isinstance(lost, Lost) and lost.num_samples == entry.num_samples
    assert lost.cause in ("shard_unreachable", "shard_missing")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_data_module_reads_a_remote_set(scenes_root: Path, tmp_path: Path, num_workers: int) -> None:
    options = {"batch_size": 8, "image_size": 32, "max_text_len": 16, "vocab_size": 400, "num_workers": num_workers}
    local = ShardDataModule(str(scenes_root), **options)  # type: ignore[arg-type]
    with serve(Unsteady(scenes_root, drops=3, busy=1)) as server:
        remote = ShardDataModule(server.url, **options, cache_dir=str(tmp_path))  # type: ignore[arg-type]
        remote.prepare_data()
        batches = [batch.keys for batch in remote.train_dataloader()]
    assert batches == [batch.keys for batch in local.train_dataloader()]


def test_a_remote_tokenizer_is_verified(scenes_copy: Path, tmp_path: Path) -> None:
    path = scenes_copy / "tokenizer.json"
    path.write_text(path.read_text().replace("[MASK]", "[BLOT]"))
    with serve(Unsteady(scenes_copy)) as server:
        storage = _storage(server.url, tmp_path)
        with pytest.raises(UserError, match="not the one of its manifest"):
            storage.read_tokenizer(storage.read_manifest().tokenizer)
        path.unlink()
        with pytest.raises(UserError, match=r"tokenizer.json is missing"):
            storage.read_tokenizer(storage.read_manifest().tokenizer)
