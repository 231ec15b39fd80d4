"""Streams of batches over one split: from (epoch, batch) to everything that follows it.

A reader has no state: what it yields is a function of seed, epoch, rank, number of streams and the place it
starts at, so an interrupted run goes on with exactly the batches that were to come. Batches are formed
inside the stream; the loader above only carries them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from torch.utils.data import IterableDataset, get_worker_info

from lightning_moevlm.errors import UserError
from lightning_moevlm.records import Batch
from lightning_moevlm.shards.collate import Collate
from lightning_moevlm.shards.manifest import Manifest, Split
from lightning_moevlm.shards.order import (
    Piece,
    Stretch,
    pieces,
    rank_stretch,
    shard_permutation,
    shuffled,
    stream_batches,
    train_batches,
    train_stretch,
)
from lightning_moevlm.shards.source import RawSample, all_or_error, read_shard
from lightning_moevlm.shards.storage import ShardStorage


@dataclass(frozen=True)
class Cursor:
    """A place in the order: `batch` batches of epoch number `epoch` have been handed out on this rank."""

    epoch: int
    batch: int


@dataclass(frozen=True)
class Rank:
    """Which of how many processes reads."""

    index: int
    world_size: int


@dataclass(frozen=True)
class Failure:
    """A user's mistake found in a worker; it travels as data, so that its one line arrives unharmed."""

    message: str


@dataclass(frozen=True)
class ShardReader:
    """Reads one split of a set for one rank.

    batch_size: samples per rank and step. shuffle_buffer: samples per stream to choose the next one from; 0
    reads in fixed order, every sample once, the last batch as short as it comes out. Otherwise every batch
    is whole.
    """

    storage: ShardStorage
    manifest: Manifest
    split: Split
    collate: Collate
    batch_size: int
    rank: Rank
    shuffle_buffer: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_batches == 0:
            raise UserError(
                f"the {self.split} split of {self.storage} has {self.manifest.num_samples(self.split)} samples, "
                f"less than batch_size {self.batch_size} on each of {self.rank.world_size} ranks; "
                "lower batch_size or build a larger set"
            )

    @property
    def num_batches(self) -> int:
        """Batches of one epoch on this rank."""
        if self.shuffle_buffer:
            num_samples = self.manifest.num_samples(self.split)
            return train_batches(num_samples, self.batch_size, self.rank.world_size)
        return -(-len(self._own_samples) // self.batch_size)

    def batches(self, start: Cursor, stream: int, num_streams: int) -> Iterator[Batch]:
        """Yield what one of `num_streams` streams still has to give from `start` on.

        Raises:
            UserError: if a shard is missing or altered, or a sample cannot be decoded.

        """
        stretch = self._stretch(stream, num_streams)
        if self.shuffle_buffer:
            reader = f"{self.rank.index}/{self.rank.world_size}/{stream}/{num_streams}"
            random = Random(f"samples/{self.seed}/{start.epoch}/{reader}")
            order = shuffled(len(stretch), self.shuffle_buffer, random)
        else:
            order = iter(range(len(stretch)))
        handed_out = stream_batches(start.batch, stream, num_streams) * self.batch_size
        samples = self._samples(self._pieces(stretch, start.epoch), order, handed_out)
        while batch := list(islice(samples, self.batch_size)):
            yield self.collate(batch)

    @property
    def _own_samples(self) -> Stretch:
        return rank_stretch(self.manifest.num_samples(self.split), self.rank.index, self.rank.world_size)

    def _stretch(self, stream: int, num_streams: int) -> Stretch:
        if self.shuffle_buffer:
            return train_stretch(self.num_batches, self.batch_size, self.rank.index, stream, num_streams)
        # the batches are the same for any number of streams: only who reads them changes
        mine, own = (
            train_stretch(self.num_batches, self.batch_size, 0, stream, num_streams),
            self._own_samples,
        )
        return Stretch(own.start + mine.start, min(own.start + mine.stop, own.stop))

    def _pieces(self, stretch: Stretch, epoch: int) -> tuple[Piece, ...]:
        sizes = [shard.num_samples for shard in self.manifest.splits[self.split]]
        order = shard_permutation(len(sizes), self.seed, epoch) if self.shuffle_buffer else range(len(sizes))
        return pieces(stretch, sizes, tuple(order))

    def _samples(self, line: tuple[Piece, ...], order: Iterator[int], handed_out: int) -> Iterator[RawSample]:
        """Yield samples in `order` (numbers within the line), without the first `handed_out`."""
        gone = set(islice(order, handed_out))
        arriving = self._arriving(line, gone)
        waiting: dict[int, RawSample] = {}
        for number in order:
            while number not in waiting:
                arrived, sample = next(arriving)
                waiting[arrived] = sample
            yield waiting.pop(number)

    def _arriving(self, line: tuple[Piece, ...], gone: set[int]) -> Iterator[tuple[int, RawSample]]:
        """Read the line in order, without samples that are gone; shards that are all gone stay closed."""
        for piece in line:
            numbers = range(piece.first, piece.first + piece.stop - piece.start)
            if gone and gone.issuperset(numbers):
                continue
            shard = self.manifest.splits[self.split][piece.shard]
            samples = all_or_error(read_shard(self.storage, shard, self.collate.wanted))
            # a piece that ends with its shard reads past its last sample, so that the count is checked
            stop = None if piece.stop == shard.num_samples else piece.stop
            for number, sample in enumerate(islice(samples, piece.start, stop), piece.first):
                if number not in gone:
                    yield number, sample


class BatchStream(IterableDataset[Batch | Failure]):
    """What one loader worker runs: its stream of the reader, from the cursor on."""

    def __init__(self, reader: ShardReader, start: Cursor) -> None:
        self._reader = reader
        self._start = start

    def __iter__(self) -> Iterator[Batch | Failure]:
        """Yield this worker's batches; a user's mistake ends the stream as a `Failure`."""
        worker = get_worker_info()
        worker_id, num_streams = (worker.id, worker.num_workers) if worker else (0, 1)
        # the loader asks worker 0 first: it must hold the stream that the next batch belongs to
        stream = (worker_id + self._start.batch) % num_streams
        try:
            yield from self._reader.batches(self._start, stream, num_streams)
        except UserError as error:
            yield Failure(str(error))
