"""Orders samples by pure functions, so that any place in any epoch can be computed.

1. The shards are permuted by (seed, epoch), alike on every rank, before anything is split.
2. The permuted samples form one sequence. It is split into ranges by rank, and these by logical stream: batch b of a
   rank comes from its stream b mod `num_streams`. Splitting samples instead of shards gives every rank the same number
   of batches, for any sizes and number of shards. The number of processes (worker w serves the streams s with
   s mod num_workers = w) changes nothing.
3. Within a range a shuffle buffer hands out one of its samples at random and refills the place. It is simulated with
   sample numbers alone, so its state after n samples is known without reading any.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple


class SampleRange(NamedTuple):
    """Samples start..stop-1 of a sequence."""

    start: int
    stop: int

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.stop - self.start


class ShardRange(NamedTuple):
    """Samples start..stop-1 of one shard."""

    shard: int
    start: int
    stop: int
    first: int  # number of sample `start` within its sample range


@dataclass(frozen=True)
class Rank:
    """The number of a process among all that read."""

    index: int
    world_size: int


def shard_permutation(num_shards: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the order of the shards in one epoch."""
    return tuple(Random(f"shards/{seed}/{epoch}").sample(range(num_shards), num_shards))


def train_batches(num_samples: int, batch_size: int, world_size: int) -> int:
    """Return the whole batches per rank, equal on all ranks; a partial last batch is left out."""
    return num_samples // (batch_size * world_size)


def train_range(batches: int, batch_size: int, rank: int, stream: int, num_streams: int) -> SampleRange:
    """Return the samples of one stream of one rank in an epoch of whole batches."""
    before = sum(stream_batches(batches, s, num_streams) for s in range(stream))
    start = (rank * batches + before) * batch_size
    return SampleRange(start, start + stream_batches(batches, stream, num_streams) * batch_size)


def running_range(num_samples: int, rank: Rank, stream: int, num_streams: int) -> SampleRange:
    """Return the samples of one stream of one rank in a source that runs on; all streams get equally many."""
    length = num_samples // (rank.world_size * num_streams)
    start = (rank.index * num_streams + stream) * length
    return SampleRange(start, start + length)


def stream_batches(batches: int, stream: int, num_streams: int) -> int:
    """Return the number of a rank's batches from one stream."""
    return len(range(stream, batches, num_streams))


def fixed_batches(num_samples: int, batch_size: int, world_size: int) -> int:
    """Return the batches per rank, equal on all ranks, if every sample is read once; 0 if a rank has no sample.

    Every rank needs a sample in its last batch: with `batch_size` 1 and a remainder, one batch holds 2.
    """
    per_rank = -(-num_samples // world_size)
    return min(-(-per_rank // batch_size), num_samples // world_size)


def fixed_range(num_samples: int, batches: int, rank: Rank, number: int) -> SampleRange:
    """Return the samples of one of a rank's batches if every sample is read once; batches have nearly equal size.

    number: of the batch in the order of samples, not of time (see `fixed_number`).
    """
    place, total = rank.index * batches + number, batches * rank.world_size
    return SampleRange(place * num_samples // total, (place + 1) * num_samples // total)


def fixed_number(batch: int, batches: int, num_streams: int) -> int:
    """Return the number in the order of samples of batch `batch` in time, so that streams read without gaps."""
    stream = batch % num_streams
    before = sum(stream_batches(batches, s, num_streams) for s in range(stream))
    return before + batch // num_streams


def split_by_shard(
    sample_range: SampleRange, shard_sizes: Sequence[int], permutation: Sequence[int]
) -> tuple[ShardRange, ...]:
    """Return the samples of each shard in a range of the permuted sequence."""
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
    """Yield 0..length-1, each once, in the order of a shuffle buffer of `buffer_size` places."""
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
