"""Reads each sample of a split once, in a fixed order, as evaluation needs it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.faults import Lost, lost_batch_error
from lightning_moevlm.data.format.shard_reader import RawSample
from lightning_moevlm.data.images.allocation import Allocate
from lightning_moevlm.data.read.collate import Decoded
from lightning_moevlm.data.read.join_batches import join_batches
from lightning_moevlm.data.read.reader import Cursor, Delivery, Reader
from lightning_moevlm.data.read.sample_order import Rank, SampleRange, fixed_batches, fixed_number, fixed_range
from lightning_moevlm.data.read.source_stream import ReadSource


@dataclass(frozen=True)
class FixedReader(Reader):
    """Reads every sample of every source once, in order, source by source; a batch is of one source.

    Every rank has equally many batches of nearly equal size, at most `batch_size`. A stream reads consecutive samples,
    so with several streams batches alternate between as many places of the split.
    """

    sources: tuple[ReadSource, ...]
    batch_size: int
    rank: Rank
    num_streams: int
    tolerant: bool

    def __post_init__(self) -> None:
        for source, batches in zip(self.sources, self._batches, strict=True):
            if source.num_samples == 0:
                raise UserError(
                    f"the evaluation split of {source.name} is empty: build the set again with more samples. If its "
                    "tars were indexed as one split, index them again without --split"
                )
            if batches == 0:
                raise UserError(
                    f"source {source.name} has {source.num_samples} evaluation samples, less than one for each of "
                    f"{self.rank.world_size} ranks; use fewer ranks, or build a larger set"
                )

    @property
    def num_batches(self) -> int:
        """Batches of all sources on this rank."""
        return sum(self._batches)

    @property
    def order(self) -> dict[str, object]:
        """All that the order of batches depends on."""
        return {
            "sources": [source.name for source in self.sources],
            "num_samples": [source.num_samples for source in self.sources],
            "batch_size": self.batch_size,
            "world_size": self.rank.world_size,
            "num_streams": self.num_streams,
        }

    def next_epoch(self, before: Cursor) -> Cursor:
        """Return the beginning of the next epoch."""
        return Cursor(before.epoch + 1, 0)

    def stream(self, start: Cursor, stream: int, allocate: Allocate) -> Iterator[Delivery]:
        """Yield the stream's batches.

        Raises:
            UserError: if a batch has lost all its samples: every rank has to evaluate equally many batches.
        """
        offset = 0
        for k, batches in enumerate(self._batches):
            own = [batch for batch in range(batches) if (offset + batch) % self.num_streams == stream]
            own = [batch for batch in own if offset + batch >= start.batch]
            offset += batches
            if own:
                yield from self._read_source(k, [self._range(k, batch) for batch in own], allocate)

    def _read_source(self, k: int, ranges: Sequence[SampleRange], allocate: Allocate) -> Iterator[Delivery]:
        source = self.sources[k]
        whole = SampleRange(ranges[0].start, ranges[-1].stop)
        assert len(whole) == sum(map(len, ranges)), "a stream reads without gaps"
        arriving = source.read(source.split_by_shard(whole, tuple(range(len(source.shards)))), set())
        for sample_range in ranges:
            yield self._delivery(k, islice(arriving, len(sample_range)), len(sample_range), allocate)

    def _delivery(
        self, k: int, arriving: Iterator[tuple[int, RawSample | Lost]], num_samples: int, allocate: Allocate
    ) -> Delivery:
        source = self.sources[k]
        rows = source.collate.image_rows(num_samples, allocate)
        samples: list[Decoded] = []
        lost: list[Lost] = []
        for _, raw in arriving:
            sample = source.decode(raw, None if rows is None else rows[len(samples)])
            if isinstance(sample, Decoded):
                samples.append(sample)
            else:
                lost.append(self._accept_loss(sample))
        causes = Counter(sample.cause for sample in lost)
        last_error = lost[-1].message if lost else ""
        if not samples:
            raise lost_batch_error(num_samples, last_error)
        batch = source.collate.make_batch(samples, None if rows is None else rows[: len(samples)])
        images = source.collate.pack_jpegs(samples, len(samples))
        batch = join_batches({k: batch}, [each.name for each in self.sources])
        return Delivery(batch, (), dict(causes), last_error, images)

    @property
    def _batches(self) -> tuple[int, ...]:
        sizes = [source.num_samples for source in self.sources]
        return tuple(fixed_batches(size, self.batch_size, self.rank.world_size) for size in sizes)

    def _range(self, k: int, batch: int) -> SampleRange:
        number = fixed_number(batch, self._batches[k], self.num_streams)
        return fixed_range(self.sources[k].num_samples, self._batches[k], self.rank, number)
