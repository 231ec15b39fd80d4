"""Reads chosen samples of a split, each as it is stored."""

from collections.abc import Collection, Iterator

from lightning_moevlm.data.format.faults import Lost
from lightning_moevlm.data.format.manifest import Manifest, Split
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.storage.shard_storage import ShardStorage


def read_chosen(
    storage: ShardStorage, manifest: Manifest, split: Split, numbers: Collection[int], members: Collection[str]
) -> Iterator[RawSample | Lost]:
    """Yield the samples with these numbers, in the order of the split; shards without one of them stay closed.

    Args:
        storage: place of the set.
        manifest: of the set.
        split: that is read.
        numbers: of samples, from 0 in the order of the manifest's shards.
        members: extensions to read.
    """
    wanted, chosen = frozenset(members), frozenset(numbers)
    first = 0
    for shard in manifest.splits[split]:
        number, first = first, first + shard.num_samples
        if chosen.isdisjoint(range(number, first)):
            continue
        for sample in read_shard(storage, shard, wanted, manifest.layout):
            count = sample.num_samples if isinstance(sample, Lost) else 1
            for place in range(number, number + count):
                if place in chosen:
                    yield sample._replace(num_samples=1) if isinstance(sample, Lost) else sample
            number += count
