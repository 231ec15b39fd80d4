"""Reading real shards: who gets which sample, in which order, and what happens when a shard is broken."""

from collections import Counter
from multiprocessing import active_children
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import ShardEntry, Split, read_manifest
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard, require_all
from lightning_moevlm.data.load.shard_loader import ShardLoader
from lightning_moevlm.data.read.collate import Collate
from lightning_moevlm.data.read.evaluation_reader import FixedReader
from lightning_moevlm.data.read.mixture import Mixture, Source, StepClock
from lightning_moevlm.data.read.sample_order import Rank
from lightning_moevlm.data.read.source_stream import OpenSource
from lightning_moevlm.data.read.train_reader import TrainReader
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.tokenizer import load_tokenizer

ALONE = Rank(0, 1)
Keys = list[tuple[str, ...]]


def _source(root: Path, split: Split) -> OpenSource:
    manifest = read_manifest(root)
    collate = Collate(manifest.members, load_tokenizer(root, manifest.tokenizer), 32, 24)
    return OpenSource(manifest.name, ShardStorage(str(root)), manifest.splits[split], collate)


def _reader(
    root: Path, batch_size: int = 8, rank: Rank = ALONE, seed: int = 0, num_streams: int = 4, tolerant: bool = False
) -> TrainReader:
    mixture = Mixture((Source(str(root)),))
    return TrainReader(
        (_source(root, "train"),), mixture, batch_size, rank, 30, seed, num_streams, StepClock(15), tolerant
    )


def _fixed(root: Path, batch_size: int = 5, rank: Rank = ALONE, num_streams: int = 4) -> FixedReader:
    return FixedReader((_source(root, "val"),), batch_size, rank, num_streams, tolerant=False)


def _keys(loader: ShardLoader) -> Keys:
    return [batch.keys for batch in loader]


def _stored(root: Path, split: Split) -> list[str]:
    return [s.key for shard in read_manifest(root).splits[split] for s in _samples(root, shard)]


def _samples(root: Path, shard: ShardEntry) -> list[RawSample]:
    return list(require_all(read_shard(ShardStorage(str(root)), shard, frozenset({"txt"}))))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_sees_each_sample_at_most_once_an_epoch_in_whole_batches(scenes_root: Path, num_workers: int) -> None:
    loader = ShardLoader(_reader(scenes_root), num_workers)
    stored = _stored(scenes_root, "train")
    keys = _keys(loader)
    assert len(keys) == len(loader) == len(stored) // 8
    seen = [key for batch in keys for key in batch]
    assert all(len(batch) == 8 for batch in keys)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(stored)
    assert seen != [key for key in stored if key in set(seen)], "not shuffled"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_epoch_has_another_order_and_a_seed_repeats_them(scenes_root: Path, num_workers: int) -> None:
    # WebDataset repeats one shard order every epoch (its issues 172, 190; pull request 502)
    first, second = ShardLoader(_reader(scenes_root), num_workers), ShardLoader(_reader(scenes_root), 0)
    epochs = [_keys(first) for _ in range(3)]
    assert epochs == [_keys(second) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # the shards themselves come in another order, not only the samples within the buffer
    assert len({tuple(sorted(k for batch in epoch[:3] for k in batch)) for epoch in epochs}) == 3
    assert _keys(ShardLoader(_reader(scenes_root, seed=1), 0)) != epochs[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_no_sample_and_have_equally_many_batches(scenes_root: Path, world_size: int) -> None:
    # unequal batch counts would hang a distributed run (Lightning issue 20404)
    keys = [_keys(ShardLoader(_reader(scenes_root, rank=Rank(r, world_size)), 0)) for r in range(world_size)]
    assert {len(k) for k in keys} == {len(_stored(scenes_root, "train")) // (8 * world_size)}
    seen = Counter(key for rank in keys for batch in rank for key in batch)
    assert max(seen.values()) == 1


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_validation_sees_every_sample_once_in_fixed_order(scenes_root: Path, num_workers: int) -> None:
    loader = ShardLoader(_fixed(scenes_root), num_workers)
    stored = _stored(scenes_root, "val")
    assert len(stored) % 5, "batches should differ in this test"
    keys = _keys(loader)
    assert keys == _keys(loader), "another order in the second epoch"
    assert keys == _keys(ShardLoader(_fixed(scenes_root), 0)), "another order with other workers"
    assert len(keys) == len(loader) == -(-len(stored) // 5)
    assert sorted(key for batch in keys for key in batch) == sorted(stored)
    sizes = set(map(len, keys))
    assert max(sizes) <= 5 and max(sizes) - min(sizes) <= 1
    # one stream reads in stored order
    assert [key for batch in _keys(ShardLoader(_fixed(scenes_root, num_streams=1), 0)) for key in batch] == stored


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_validation_over_ranks_loses_and_repeats_nothing(scenes_root: Path, world_size: int, batch_size: int) -> None:
    ranks = [_fixed(scenes_root, batch_size, Rank(r, world_size)) for r in range(world_size)]
    seen = [_keys(ShardLoader(reader, 0)) for reader in ranks]
    assert len(set(map(len, seen))) == 1, "ranks would wait for each other"
    assert sorted(key for rank in seen for batch in rank for key in batch) == sorted(_stored(scenes_root, "val"))


@pytest.mark.parametrize(("num_workers", "later"), [(0, 0), (1, 1), (2, 2), (0, 2), (2, 1)])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resume_in_an_epoch_is_exact(scenes_root: Path, num_workers: int, later: int, stop: int) -> None:
    # with prefetching workers a saved state runs ahead of the training unless it is counted on hand-out
    whole = ShardLoader(_reader(scenes_root), 0)
    expected = [_keys(whole), _keys(whole)]
    interrupted = ShardLoader(_reader(scenes_root), num_workers)
    iterator = iter(interrupted)
    assert [next(iterator).keys for _ in range(stop)] == expected[0][:stop]
    state = interrupted.state_dict()
    resumed = ShardLoader(_reader(scenes_root), later)
    resumed.load_state_dict(state)
    assert _keys(resumed) == expected[0][stop:]
    assert next(iter(resumed)).keys == expected[1][0]


def test_resumed_batches_have_the_same_content(scenes_root: Path) -> None:
    loader = ShardLoader(_reader(scenes_root), 0)
    states, whole = [], []
    for batch in loader:
        whole.append(batch)
        states.append(loader.state_dict())
    resumed = ShardLoader(_reader(scenes_root), 0)
    resumed.load_state_dict(states[-2])
    (last,) = list(resumed)
    assert last.keys == whole[-1].keys
    assert (last.images_BRYX == whole[-1].images_BRYX).all() and (last.text_BL == whole[-1].text_BL).all()


def test_state_at_the_end_of_an_epoch_resumes_with_the_next(scenes_root: Path) -> None:
    whole = ShardLoader(_reader(scenes_root), 0)
    epochs = [_keys(whole), _keys(whole)]
    saved = ShardLoader(_reader(scenes_root), 0)
    iterator = iter(saved)
    for _ in range(len(saved)):  # a trainer that knows the length never asks for the end
        next(iterator)
    resumed = ShardLoader(_reader(scenes_root), 0)
    resumed.load_state_dict(saved.state_dict())
    assert _keys(resumed) == epochs[1]


def test_an_epoch_cut_short_counts_but_an_untouched_iterator_does_not(scenes_root: Path) -> None:
    whole = ShardLoader(_reader(scenes_root), 0)
    epochs = [_keys(whole), _keys(whole)]
    loader = ShardLoader(_reader(scenes_root), 0, batches_per_epoch=2)
    iter(loader)  # Lightning makes one more iterator than it uses when it resumes
    iterator = iter(loader)
    assert [next(iterator).keys for _ in range(2)] == epochs[0][:2]
    resumed = ShardLoader(_reader(scenes_root), 0, batches_per_epoch=2)
    resumed.load_state_dict(loader.state_dict())
    assert next(iter(loader)).keys == epochs[1][0]
    assert next(iter(resumed)).keys == epochs[1][0]


def test_resume_with_another_order_is_refused(scenes_root: Path) -> None:
    state = ShardLoader(_reader(scenes_root), 2).state_dict()
    for loader, name in (
        (ShardLoader(_reader(scenes_root, num_streams=2), 0), "num_streams was 4 in the checkpoint and is 2 now"),
        (ShardLoader(_reader(scenes_root), 0, digest="another"), "manifest_digest"),
        (ShardLoader(_reader(scenes_root, batch_size=4), 2), "batch_size"),
        (ShardLoader(_reader(scenes_root, seed=9), 2), "seed"),
        (ShardLoader(_reader(scenes_root, rank=Rank(0, 2)), 2), "world_size"),
    ):
        with pytest.raises(UserError, match=name):
            loader.load_state_dict(state)


def test_a_split_smaller_than_one_batch_is_refused(scenes_root: Path) -> None:
    with pytest.raises(UserError, match=r"lower data\.batch_size"):
        _reader(scenes_root, batch_size=1000)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_shard_stops_the_epoch_with_one_line(scenes_copy: Path, num_workers: int) -> None:
    # a truncated tar passes WebDataset silently, even with its strictest handler
    shard = scenes_copy / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    before = set(active_children())
    with pytest.raises(UserError, match=r"train-000002\.tar is truncated") as error:
        _keys(ShardLoader(_reader(scenes_copy), num_workers))
    assert "\n" not in str(error.value)
    assert set(active_children()) <= before  # the workers have ended, although the traceback is kept


def test_missing_and_altered_shards(scenes_copy: Path) -> None:
    path = scenes_copy / "train-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:3000] + bytes([data[3000] ^ 255]) + data[3001:])
    with pytest.raises(UserError, match=r"train-000001\.tar is not the one of its manifest"):
        _keys(ShardLoader(_reader(scenes_copy), 0))
    path.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar is missing"):
        _keys(ShardLoader(_reader(scenes_copy), 0))


def test_a_manifest_that_miscounts_is_found_at_the_end_of_the_shard(scenes_root: Path) -> None:
    entry = read_manifest(scenes_root).splits["train"][0]
    wrong = ShardEntry(entry.file, entry.num_samples + 1, entry.num_bytes, entry.sha256)
    with pytest.raises(UserError, match=f"holds {entry.num_samples} samples, its manifest says {wrong.num_samples}"):
        _samples(scenes_root, wrong)


def test_a_file_that_is_not_a_tar(tmp_path: Path) -> None:
    from lightning_moevlm.data.format.manifest import file_sha256

    path = tmp_path / "x.tar"
    path.write_bytes(b"no tar at all" * 100)
    entry = ShardEntry("x.tar", 1, path.stat().st_size, file_sha256(path))
    with pytest.raises(UserError, match="is not a valid tar from byte 0 on, so that 1 of 1 samples are lost"):
        _samples(tmp_path, entry)
