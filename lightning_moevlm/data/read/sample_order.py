"""In which order samples are read: pure functions, so any place in any epoch can be found again.

1. The shards are permuted by (seed, epoch), alike on every rank, before anything is split.
2. The permuted samples are one long line. It is cut into stretches by rank, and these by logical stream: batch b of a
   rank comes from its stream b mod `num_streams`. Cutting samples, not shards, gives every rank the same number of
   batches whatever the shards' sizes, and any number of shards will do. How many processes serve the streams
   (worker w those with s mod num_workers = w) changes nothing.
3. Within a stretch a shuffle buffer hands out one of its samples at random and refills the place. The buffer is played
   through with sample numbers alone, so where it stands after n samples is known without reading any.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple


class SampleRange(NamedTuple):
    """Samples start..stop-1 of a line of samples."""

    start: int
    stop: int

    def __len__(self) -> int:
        """Samples in the stretch."""
        return self.stop - self.start


class ShardRange(NamedTuple):
    """Samples start..stop-1 of one shard; first: the number of sample `start` within its stretch."""

    shard: int
    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Rank:
    """Which of how many processes reads."""

    index: int
    world_size: int


def shard_permutation(num_shards: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the order of the shards in one epoch."""
    return tuple(Random(f"shards/{seed}/{epoch}").sample(range(num_shards), num_shards))


def train_batches(num_samples: int, batch_size: int, world_size: int) -> int:
    """Whole batches per rank, the same on every rank; the ragged tail of the epoch is left out."""
    return num_samples // (batch_size * world_size)


def train_range(batches: int, batch_size: int, rank: int, stream: int, num_streams: int) -> SampleRange:
    """Return what one stream of one rank reads in an epoch of whole batches."""
    before = sum(stream_batches(batches, s, num_streams) for s in range(stream))
    start = (rank * batches + before) * batch_size
    return SampleRange(start, start + stream_batches(batches, stream, num_streams) * batch_size)


def running_range(num_samples: int, rank: Rank, stream: int, num_streams: int) -> SampleRange:
    """Return what one stream of one rank reads of a source that runs on: as much as every other stream does."""
    length = num_samples // (rank.world_size * num_streams)
    start = (rank.index * num_streams + stream) * length
    return SampleRange(start, start + length)


def stream_batches(batches: int, stream: int, num_streams: int) -> int:
    """How many of a rank's batches one stream serves."""
    return len(range(stream, batches, num_streams))


def fixed_batches(num_samples: int, batch_size: int, world_size: int) -> int:
    """Batches per rank, the same on every rank, when every sample is read once; 0 if ranks are left without a sample.

    Ranks must not outnumber the samples of their last batch: with `batch_size` 1 and a remainder, one batch holds 2.
    """
    per_rank = -(-num_samples // world_size)
    return min(-(-per_rank // batch_size), num_samples // world_size)


def fixed_range(num_samples: int, batches: int, rank: Rank, number: int) -> SampleRange:
    """Return the samples of one of a rank's batches when every sample is read once: all batches of nearly equal size.

    number: counts the rank's batches in the order of its samples, which is not that of time (see `fixed_number`).
    """
    place, total = rank.index * batches + number, batches * rank.world_size
    return SampleRange(place * num_samples // total, (place + 1) * num_samples // total)


def fixed_number(batch: int, batches: int, num_streams: int) -> int:
    """Return which batch in the order of samples comes as batch number `batch`, so that streams read without gaps."""
    stream = batch % num_streams
    before = sum(stream_batches(batches, s, num_streams) for s in range(stream))
    return before + batch // num_streams


def split_by_shard(
    sample_range: SampleRange, shard_sizes: Sequence[int], permutation: Sequence[int]
) -> tuple[ShardRange, ...]:
    """Say which samples of which shards a stretch of the permuted line consists of."""
    found: list[ShardRange] = []
    begin = 0
    for shard in permutation:
        end = begin + shard_sizes[shard]
        start, stop = max(sample_range.start, begin), min(sample_range.stop, end)
        if start < stop:
            found.append(ShardRange(shard, start - begin, stop - begin, start - sample_range.start))
        begin = end
    return tuple(found)


def shuffle(length: int, buffer_size: int, random: Random) -> Iterator[int]:
    """Yield 0..length-1, each once, as a shuffle buffer of `buffer_size` places would hand them out."""
    buffer: list[int] = []
    for arriving in range(length):
        if len(buffer) < buffer_size:
            buffer.append(arriving)
        else:
            place = random.randrange(buffer_size)
            leaving, buffer[place] = buffer[place], arriving
            yield leaving
    random.shuffle(buffer)
    yield from buffer
