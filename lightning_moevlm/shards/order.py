"""In which order samples are read: pure functions, so any place in any epoch can be found again.

1. The shards are permuted by (seed, epoch), alike on every rank, before anything is split. 2. The permuted
samples are one long line; it is cut into equal stretches by rank, and these by stream (one stream per
   loader worker). Cutting samples, not shards, gives every rank the same number of batches whatever the
   shards' sizes.
3. Within a stretch a shuffle buffer hands out one of its samples at random and refills the place. The
buffer is played
   through with sample numbers alone, so where it stands after n samples is known without reading any.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple


class Stretch(NamedTuple):
    """Samples start..stop-1 of a line of samples."""

    start: int
    stop: int

    def __len__(self) -> int:
        """Samples in the stretch."""
        return self.stop - self.start


class Piece(NamedTuple):
    """Samples start..stop-1 of one shard; first: the number of sample `start` within its stretch."""

    shard: int
    start: int
    stop: int
    first: int


def shard_permutation(num_shards: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the order of the shards in one epoch."""
    return tuple(Random(f"shards/{seed}/{epoch}").sample(range(num_shards), num_shards))


def train_batches(num_samples: int, batch_size: int, world_size: int) -> int:
    """Whole batches per rank, the same on every rank; the ragged tail of the epoch is left out."""
    return num_samples // (batch_size * world_size)


def train_stretch(batches: int, batch_size: int, rank: int, stream: int, num_streams: int) -> Stretch:
    """Return what one stream of one rank reads; stream s serves the batches s, s + num_streams, ..."""
    before = sum(stream_batches(batches, s, num_streams) for s in range(stream))
    start = (rank * batches + before) * batch_size
    return Stretch(start, start + stream_batches(batches, stream, num_streams) * batch_size)


def stream_batches(batches: int, stream: int, num_streams: int) -> int:
    """How many of a rank's batches one stream serves."""
    return len(range(stream, batches, num_streams))


def rank_stretch(num_samples: int, rank: int, world_size: int) -> Stretch:
    """Every sample once: cut the line by rank into stretches that differ by one sample at most."""
    return Stretch(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)


def pieces(stretch: Stretch, shard_sizes: Sequence[int], permutation: Sequence[int]) -> tuple[Piece, ...]:
    """Say which samples of which shards a stretch of the permuted line consists of."""
    found: list[Piece] = []
    begin = 0
    for shard in permutation:
        end = begin + shard_sizes[shard]
        start, stop = max(stretch.start, begin), min(stretch.stop, end)
        if start < stop:
            found.append(Piece(shard, start - begin, stop - begin, start - stretch.start))
        begin = end
    return tuple(found)


def shuffled(length: int, buffer_size: int, random: Random) -> Iterator[int]:
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
