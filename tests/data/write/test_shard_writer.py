import tarfile
from collections import Counter
from pathlib import Path

import pytest

from lightning_moevlm.data.format.manifest import check_shard
from lightning_moevlm.data.write.shard_writer import Sample, ShardWriter, choose_split


def _samples(count: int) -> list[Sample]:
    return [Sample(f"s{i:03d}", f"id{i}", bytes([i]) * (100 + i), "jpg", f"caption {i}", "{}") for i in range(count)]


def _write(root: Path, count: int) -> dict[str, list[str]]:
    root.mkdir()
    with ShardWriter(root, samples_per_shard=7) as writer:
        for sample in _samples(count):
            writer.write(sample)
    for shards in writer.entries.values():
        for shard in shards:
            check_shard(root, shard)
    return {split: [shard.sha256 for shard in shards] for split, shards in writer.entries.items()}


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    assert _write(tmp_path / "a", 60) == _write(tmp_path / "b", 60)


def test_a_plain_tar_reader_finds_every_member(tmp_path: Path) -> None:
    _write(tmp_path / "a", 60)
    found = {}
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.suffix == ".tar"
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                found[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    assert len(found) == 60 * 3
    for sample in _samples(60):
        assert found[f"{sample.key}.jpg"] == sample.image
        assert found[f"{sample.key}.txt"].decode() == sample.caption
        assert found[f"{sample.key}.json"] == b"{}"


def test_shards_hold_at_most_samples_per_shard(tmp_path: Path) -> None:
    root = tmp_path / "a"
    root.mkdir()
    with ShardWriter(root, samples_per_shard=7) as writer:
        for sample in _samples(60):
            writer.write(sample)
    counts = [shard.num_samples for shard in writer.entries["train"]]
    assert all(count == 7 for count in counts[:-1])
    assert sum(shard.num_samples for shards in writer.entries.values() for shard in shards) == 60


def test_nothing_unfinished_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, samples_per_shard=1000) as writer:
        for sample in _samples(20):
            writer.write(sample)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_split_depends_on_identity_alone_and_is_80_10_10() -> None:
    shares = Counter(choose_split(f"identity {i}") for i in range(10_000))
    # standard deviations of the counts: 40, 30, 30
    assert abs(shares["train"] - 8000) < 200
    assert abs(shares["val"] - 1000) < 150
    assert abs(shares["test"] - 1000) < 150
    # sha256("a") begins ca97, 0xca/256 = 0.789 < 0.8; sha256("c") 2e7d, 0.18; sha256("g") cd0a, 0.801
    assert [choose_split(identity) for identity in "acg"] == ["train", "train", "val"]
