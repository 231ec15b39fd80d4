"""One source as one stream of one rank reads it: a line of samples, from any place on, every loss accounted for.

A line has no state: what it yields is a function of seed, epoch, stretch and the place it starts at. A lost sample
takes its turn in the order like any other, so that a resumed run counts it once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import NamedTuple

from torch import Tensor

from lightning_moevlm.data.format.faults import Lost, SampleFault
from lightning_moevlm.data.format.layout import PLAIN_LAYOUT, Layout
from lightning_moevlm.data.format.manifest import ShardEntry
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.read.collate import Collate, Decoded
from lightning_moevlm.data.read.sample_order import SampleRange, ShardRange, shard_permutation, shuffle, split_by_shard
from lightning_moevlm.data.storage.next_shard import ShardPrefetcher
from lightning_moevlm.data.storage.shard_storage import ShardStorage


@dataclass(frozen=True)
class OpenSource:
    """One split of a set, and how its samples are decoded.

    name: in messages, in the log and in the state. layout: where members lie in its tars.
    """

    name: str
    storage: ShardStorage
    shards: tuple[ShardEntry, ...]
    collate: Collate
    layout: Layout = PLAIN_LAYOUT

    @property
    def num_samples(self) -> int:
        """Samples that the manifest promises."""
        return sum(shard.num_samples for shard in self.shards)

    def split_by_shard(self, sample_range: SampleRange, permutation: tuple[int, ...]) -> tuple[ShardRange, ...]:
        """Say which samples of which shards a stretch consists of."""
        return split_by_shard(sample_range, [shard.num_samples for shard in self.shards], permutation)

    def read(self, line: tuple[ShardRange, ...], gone: set[int]) -> Iterator[tuple[int, RawSample | Lost]]:
        """Read pieces in order, numbered, without samples that are gone; shards that are all gone stay closed."""
        left = [shard_range for shard_range in line if not gone or not gone.issuperset(_numbers(shard_range))]
        with ShardPrefetcher(self.storage, [self.shards[shard_range.shard] for shard_range in left]) as ahead:
            for shard_range in left:
                read = read_shard(ahead, self.shards[shard_range.shard], self.collate.wanted, self.layout)
                found = _one_by_one(read)
                for number, sample in zip(
                    _numbers(shard_range), islice(found, shard_range.start, shard_range.stop), strict=True
                ):
                    if number not in gone:
                        yield number, sample

    def decode(self, sample: RawSample | Lost, into: Tensor | None, draw: str = "") -> Decoded | Lost:
        """Decode a sample, its image into a row of a batch; one that cannot be used is lost.

        draw: decides which of several captions is taken (`captions.draw_caption`).
        """
        if isinstance(sample, Lost):
            return sample
        try:
            return self.collate.decode(sample, into, draw)
        except SampleFault as fault:
            return Lost(1, fault.cause, str(fault))


class Place(NamedTuple):
    """Where a stream stands in a source.

    epoch: of the source. lap: how often the stream has been through its stretch in this epoch. taken: samples of the
    stretch that have had their turn in this lap, lost ones included.
    """

    epoch: int
    lap: int = 0
    taken: int = 0


@dataclass(frozen=True)
class SourceStream:
    """A stretch of a source, read on and on in shuffled order.

    runs_on: after the stretch comes the next epoch's; otherwise the same samples in another order, to fill up for lost
    ones. reader: what tells this stream's generator from others'.
    """

    source: OpenSource
    sample_range: SampleRange
    shuffle_buffer: int
    seed: int
    reader: str
    runs_on: bool

    def samples(self, place: Place) -> Iterator[tuple[Place, RawSample | Lost]]:
        """Yield every sample from `place` on with the place after it, without end."""
        while True:
            for sample in self._lap(place):
                place = place._replace(taken=place.taken + 1)
                yield place, sample
            place = Place(place.epoch + 1) if self.runs_on else Place(place.epoch, place.lap + 1)

    def draw(self, place: Place) -> str:
        """Return what decides which of a sample's captions is taken: another one in every epoch."""
        return f"{self.seed}/{place.epoch}/{self.source.name}"

    def _lap(self, place: Place) -> Iterator[RawSample | Lost]:
        random = Random(f"samples/{self.seed}/{place.epoch}/{place.lap}/{self.reader}/{self.source.name}")
        order = shuffle(len(self.sample_range), self.shuffle_buffer, random)
        gone = set(islice(order, place.taken))
        permutation = shard_permutation(len(self.source.shards), self.seed, place.epoch)
        arriving = self.source.read(self.source.split_by_shard(self.sample_range, permutation), gone)
        waiting: dict[int, RawSample | Lost] = {}
        for number in order:
            while number not in waiting:
                arrived, sample = next(arriving)
                waiting[arrived] = sample
            yield waiting.pop(number)


def _numbers(shard_range: ShardRange) -> range:
    return range(shard_range.first, shard_range.first + shard_range.stop - shard_range.start)


def _one_by_one(samples: Iterator[RawSample | Lost]) -> Iterator[RawSample | Lost]:
    """Let every lost sample take its own place in the shard."""
    for sample in samples:
        if isinstance(sample, Lost):
            for _ in range(sample.num_samples):
                yield sample._replace(num_samples=1)
        else:
            yield sample
