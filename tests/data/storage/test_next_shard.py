"""The next shard is fetched while one is read: it saves waiting, and changes nothing else."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.faults import Lost
from lightning_moevlm.data.format.manifest import read_manifest
from lightning_moevlm.data.format.shard_reader import RawSample
from lightning_moevlm.data.read.collate import Collate
from lightning_moevlm.data.read.sample_order import SampleRange
from lightning_moevlm.data.read.source_stream import OpenSource
from lightning_moevlm.data.storage.next_shard import ShardPrefetcher
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from tests.data.unsteady_server import Unsteady, serve
from tests.waiting import wait_for

PER_SHARD, NUM_SHARDS = 16, 8


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "shard-ahead"]


def _source(root: Path, url: str, cache: Path, **options: Any) -> OpenSource:
    storage = ShardStorage(url, str(cache), **{"attempts": 2, "backoff_s": 0.001, **options})
    manifest = read_manifest(root)
    collate = Collate(("jpg", "txt"), storage.read_tokenizer(manifest.tokenizer), 32, 16)
    return OpenSource("scenes", storage, manifest.splits["train"], collate)


def _read(source: OpenSource) -> Iterator[tuple[int, RawSample | Lost]]:
    return source.read(
        source.split_by_shard(SampleRange(0, source.num_samples), tuple(range(len(source.shards)))), set()
    )


def _asked(server: Unsteady) -> list[str]:
    return [path for path, _ in server.asked if path.endswith(".tar")]


def test_the_next_shard_is_here_before_it_is_needed(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last sample of a shard is used, nobody has asked for one of the next shard."""
    samples: list[list[tuple[int, RawSample | Lost]]] = []
    with serve(Unsteady(scenes_root, delay_s=0.02)) as server:
        for ahead in (True, False):
            with monkeypatch.context() as patch:
                if not ahead:
                    patch.setattr(ShardPrefetcher, "_begin", lambda self, beside: None)
                cache, found = tmp_path / str(ahead), []
                for number, sample in _read(_source(scenes_root, server.url, cache)):
                    found.append((number, sample))
                    if number % PER_SHARD == PER_SHARD - 1:
                        expected = number // PER_SHARD + 1 + ahead
                        wait_for(lambda expected=expected, cache=cache: len(list(cache.glob("*.tar"))) == expected)
                samples.append(found)
        assert len(_asked(server)) == 2 * NUM_SHARDS, "every shard once a turn"
    assert samples[0] == samples[1] and len(samples[0]) == PER_SHARD * (NUM_SHARDS - 1) + 8


def test_one_shard_ahead_and_no_more(scenes_root: Path, tmp_path: Path) -> None:
    with serve(Unsteady(scenes_root)) as server:
        with closing(_read(_source(scenes_root, server.url, tmp_path))) as arriving:  # type: ignore[type-var]
            for number, _ in arriving:
                if number % PER_SHARD == 5:
                    time.sleep(0.05)
                    assert len(_asked(server)) <= number // PER_SHARD + 2
        assert len(_asked(server)) == NUM_SHARDS


def test_a_cache_without_room_for_two_is_not_filled_ahead(scenes_root: Path, tmp_path: Path) -> None:
    largest = max(entry.num_bytes for entry in read_manifest(scenes_root).splits["train"])
    with serve(Unsteady(scenes_root)) as server:
        source = _source(scenes_root, server.url, tmp_path, cache_gib=1.5 * largest / 2**30)
        for number, _ in _read(source):
            assert len(_asked(server)) == number // PER_SHARD + 1
        assert len(list(tmp_path.glob("*.tar"))) == 1


def test_a_shard_that_others_push_out_of_the_cache_is_read_all_the_same(scenes_root: Path, tmp_path: Path) -> None:
    with serve(Unsteady(scenes_root)) as server:
        found = []
        for number, sample in _read(_source(scenes_root, server.url, tmp_path)):
            if number % PER_SHARD == 8:
                time.sleep(0.1)  # the next one is here by now
                for path in tmp_path.glob("*.tar"):
                    path.unlink()
            found.append(sample)
        assert len(_asked(server)) == NUM_SHARDS
    assert all(isinstance(sample, RawSample) for sample in found)


def test_an_error_is_raised_when_the_turn_of_its_shard_comes(scenes_copy: Path, tmp_path: Path) -> None:
    (scenes_copy / "train-000001.tar").unlink()
    with serve(Unsteady(scenes_copy)) as server:
        found = [sample for _, sample in _read(_source(scenes_copy, server.url, tmp_path))]
        assert _asked(server).count("/train-000001.tar") == 1, "a retry would not help"
    lost = [place for place, sample in enumerate(found) if isinstance(sample, Lost)]
    assert lost == list(range(PER_SHARD, 2 * PER_SHARD))
    assert {sample.cause for sample in found if isinstance(sample, Lost)} == {"shard_missing"}


@pytest.mark.parametrize("busy", [2, 3, 1000])
def test_a_server_that_was_away_is_asked_again_when_the_turn_comes(
    scenes_root: Path, tmp_path: Path, busy: int
) -> None:
    with serve(Unsteady(scenes_root)) as server:
        source = _source(scenes_root, server.url, tmp_path)
        source.storage.local_path(source.shards[0])
        server.busy = busy  # the two tries ahead are in vain; then come two more
        arriving = _read(source)
        found = [sample for _, (_, sample) in zip(range(2 * PER_SHARD), arriving, strict=False)]
        assert _asked(server).count("/train-000001.tar") == (busy + 1 if busy < 4 else 4)
        arriving.close()  # type: ignore[attr-defined]
    assert all(isinstance(sample, RawSample) for sample in found[:PER_SHARD])
    assert {sample.cause for sample in found if isinstance(sample, Lost)} == (
        {"shard_unreachable"} if busy > 3 else set()
    )


def test_a_closed_reader_leaves_no_thread_and_no_half_file(scenes_root: Path, tmp_path: Path) -> None:
    with serve(Unsteady(scenes_root)) as server:
        source = _source(scenes_root, server.url, tmp_path)
        source.storage.local_path(source.shards[0])
        server.silent_after = 20_000  # the second one stops there, and the connection stays
        arriving = _read(source)
        next(arriving)
        while len(_asked(server)) < 2:
            time.sleep(0.01)
        assert list(tmp_path.glob("*.partial"))
        start = time.perf_counter()
        arriving.close()  # type: ignore[attr-defined]
        assert time.perf_counter() - start < 30, "the server keeps it waiting for 60 s"
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == [".tar"]


def test_a_process_that_ends_in_the_middle_leaves_no_half_file(scenes_root: Path, tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from lightning_moevlm.data.storage.next_shard import ShardPrefetcher
from lightning_moevlm.data.storage.shard_storage import ShardStorage

storage, cache = ShardStorage(sys.argv[1], sys.argv[2]), Path(sys.argv[2])
shards = storage.read_manifest().splits["train"]
sys.kept_until_the_end = ShardPrefetcher(storage, shards)
sys.kept_until_the_end.open(shards[0])
while not list(cache.glob("*.partial")):
    time.sleep(0.01)
"""
    with serve(Unsteady(scenes_root)) as server:
        source = _source(scenes_root, server.url, tmp_path)
        source.storage.local_path(source.shards[0])
        server.silent_after = 20_000
        command = [sys.executable, "-c", script, server.url, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and not done.stderr
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == [".tar"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_continues_exactly(scenes_root: Path, tmp_path: Path, num_workers: int) -> None:
    def data(root: str) -> ShardDataModule:
        return ShardDataModule(
            root, 4, 32, 16, 400, num_workers=num_workers, shuffle_buffer=5, num_streams=2, cache_dir=str(tmp_path)
        )

    local = [batch.keys for batch in data(str(scenes_root)).train_dataloader()]
    with serve(Unsteady(scenes_root, drops=3)) as server:
        loader = data(server.url).train_dataloader()
        first = [batch.keys for _, batch in zip(range(11), loader, strict=False)]
        rest = data(server.url).train_dataloader()
        rest.load_state_dict(loader.state_dict())
        assert first + [batch.keys for batch in rest] == local
