"""Reads one source for one stream of one rank: shuffled samples from any place on, with every loss counted.

A stream has no state. Its samples depend on seed, epoch, sample range and starting place. A lost sample takes its turn
like any other, so a resumed run counts it once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import NamedTuple, Protocol

from torch import Tensor

from lightning_moevlm.data.format.faults import Lost, SampleFault
from lightning_moevlm.data.format.layout import PLAIN_LAYOUT, Layout
from lightning_moevlm.data.format.manifest import ShardEntry
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.read.collate import Collate, Decoded
from lightning_moevlm.data.read.sample_order import SampleRange, ShardRange, shard_permutation, shuffle, split_by_shard
from lightning_moevlm.data.storage.next_shard import ShardPrefetcher
from lightning_moevlm.data.storage.shard_storage import ShardStorage


class ReadSource(Protocol):
    """One split of any data, with the decoder of its samples."""

    @property
    def name(self) -> str:
        """Name in messages, in the log and in the state."""
        ...

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """Its tars."""
        ...

    @property
    def collate(self) -> Collate:
        """Makes batches of its samples."""
        ...

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        ...

    def split_by_shard(self, sample_range: SampleRange, permutation: tuple[int, ...]) -> tuple[ShardRange, ...]:
        """Return the samples of each shard in a sample range."""
        ...

    def read(self, ranges: tuple[ShardRange, ...], gone: set[int]) -> Iterator[tuple[int, RawSample | Lost]]:
        """Yield numbered samples in order, without those in `gone`."""
        ...

    def decode(self, sample: RawSample | Lost, into: Tensor | None, draw: str = "") -> Decoded | Lost:
        """Decode a sample, its image into a row of a batch."""
        ...


@dataclass(frozen=True)
class OpenSource:
    """One split of a set, with the decoder of its samples."""

    name: str  # in messages, in the log and in the state
    storage: ShardStorage
    shards: tuple[ShardEntry, ...]
    collate: Collate
    layout: Layout = PLAIN_LAYOUT  # names of members in its tars

    @property
    def num_samples(self) -> int:
        """Samples according to the manifest."""
        return sum(shard.num_samples for shard in self.shards)

    def split_by_shard(self, sample_range: SampleRange, permutation: tuple[int, ...]) -> tuple[ShardRange, ...]:
        """Return the samples of each shard in a sample range."""
        return split_by_shard(sample_range, [shard.num_samples for shard in self.shards], permutation)

    def read(self, ranges: tuple[ShardRange, ...], gone: set[int]) -> Iterator[tuple[int, RawSample | Lost]]:
        """Yield numbered samples in order. gone: numbers to leave out; shards without other samples stay closed."""
        left = [shard_range for shard_range in ranges if not gone or not gone.issuperset(_numbers(shard_range))]
        with ShardPrefetcher(self.storage, [self.shards[each.shard] for each in left]) as prefetcher:
            for shard_range in left:
                read = read_shard(prefetcher, self.shards[shard_range.shard], self.collate.wanted, self.layout)
                found = _one_by_one(read)
                for number, sample in zip(
                    _numbers(shard_range), islice(found, shard_range.start, shard_range.stop), strict=True
                ):
                    if number not in gone:
                        yield number, sample

    def decode(self, sample: RawSample | Lost, into: Tensor | None, draw: str = "") -> Decoded | Lost:
        """Decode a sample, its image into a row of a batch; a fault makes it a loss.

        draw: Seed of the choice among several captions (`captions.draw_caption`).
        """
        if isinstance(sample, Lost):
            return sample
        try:
            return self.collate.decode(sample, into, draw)
        except SampleFault as fault:
            return Lost(1, fault.cause, str(fault))


class Place(NamedTuple):
    """The place of a stream in a source."""

    epoch: int  # of the source
    lap: int = 0  # complete passes through the stream's range in this epoch
    taken: int = 0  # samples of this lap that had their turn, lost ones included


@dataclass(frozen=True)
class SourceStream:
    """Reads a range of a source without end, in shuffled order."""

    source: OpenSource
    sample_range: SampleRange
    shuffle_buffer: int
    seed: int
    reader: str  # makes this stream's generator different from others
    runs_on: bool  # whether the next epoch follows; otherwise the same samples in another order, to replace lost ones

    def samples(self, place: Place) -> Iterator[tuple[Place, RawSample | Lost]]:
        """Yield samples from `place` on without end, each with the place after it."""
        while True:
            for sample in self._lap(place):
                place = place._replace(taken=place.taken + 1)
                yield place, sample
            place = Place(place.epoch + 1) if self.runs_on else Place(place.epoch, place.lap + 1)

    def draw(self, place: Place) -> str:
        """Return the seed of the choice among a sample's captions; it changes with the epoch."""
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
    """Yield a loss of several samples as single losses, so that each takes its place in the shard."""
    for sample in samples:
        if isinstance(sample, Lost):
            for _ in range(sample.num_samples):
                yield sample._replace(num_samples=1)
        else:
            yield sample
