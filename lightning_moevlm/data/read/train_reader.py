"""Reads training batches without end; seed, epoch and rank decide the order."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.format.faults import Cause, Lost
from lightning_moevlm.data.format.shard_reader import RawSample
from lightning_moevlm.data.images.allocation import Allocate
from lightning_moevlm.data.images.jpeg_batch import JpegBatch
from lightning_moevlm.data.read.bad_batches import BadBatches
from lightning_moevlm.data.read.collate import Decoded
from lightning_moevlm.data.read.join_batches import join_batches, order_sources
from lightning_moevlm.data.read.mixture import Mixture, StepClock
from lightning_moevlm.data.read.reader import BY_EPOCHS, OVER_EPOCHS, READING, Cursor, Delivery, Reader
from lightning_moevlm.data.read.sample_order import Rank, running_range, train_batches, train_range
from lightning_moevlm.data.read.source_stream import OpenSource, Place, SourceStream
from lightning_moevlm.data.read.whole_steps import whole_steps

SKIPPED = Decoded("", None, None)
"""Stands in a batch until another sample takes its row."""


@dataclass(frozen=True)
class TrainReader(Reader):
    """Reads whole batches in a new order every epoch, equally many on every rank.

    One source is read in epochs: each sample at most once. Less than a batch per rank is left out, and lost samples are
    replaced from a second pass. For a skipped sample the next one after its batch stands in, which keeps its own turn
    too, so that all later batches stay as they are. Several sources run on over the ends of epochs, each with its own
    epoch. An epoch of the mixture has as many samples as all of them. One source runs on too if its batches do not make
    whole optimiser steps: the rest of an epoch comes in the next one.
    """

    sources: tuple[OpenSource, ...]
    mixture: Mixture
    batch_size: int  # samples per rank and step
    rank: Rank
    shuffle_buffer: int  # samples per stream and source from which the next one is chosen
    seed: int
    num_streams: int
    clock: StepClock
    tolerant: bool  # whether samples may be lost; otherwise the first loss ends the run
    skip: frozenset[str] = frozenset()  # keys of samples that others stand in for
    bad_batches: BadBatches | None = None  # batches to spoil on purpose

    def __post_init__(self) -> None:
        ranks, num_samples = self.rank.world_size, sum(source.num_samples for source in self.sources)
        if self._batches_per_pass == 0:
            raise UserError(
                f"{_names(self.sources)} has {num_samples} training samples, less than batch_size {self.batch_size} on "
                f"each of {ranks} ranks; lower data.batch_size, use fewer ranks, or build a larger set"
            )
        for source in self.sources if self._runs_on else ():
            if source.num_samples < ranks * self.num_streams:
                raise UserError(
                    f"source {source.name} has {source.num_samples} training samples, less than one for each of "
                    f"{ranks} ranks x {self.num_streams} streams; lower data.num_streams, use fewer ranks, or build a "
                    "larger set"
                )

    @property
    def num_batches(self) -> int:
        """Batches of one epoch on this rank."""
        return whole_steps(self._batches_per_pass, self.clock.batches_per_step)

    @property
    def order(self) -> dict[str, object]:
        """All that places depend on. Weights may change, and act from the next batch on."""
        order: dict[str, object] = {
            "sources": [source.name for source in self.sources],
            "num_samples": [source.num_samples for source in self.sources],
            "batch_size": self.batch_size,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
            "world_size": self.rank.world_size,
            "num_streams": self.num_streams,
        }
        if len(self.sources) == 1:
            order[READING] = OVER_EPOCHS if self._runs_on else BY_EPOCHS
        return {**order, **asdict(self.clock)} if self.mixture.changes else order

    def next_epoch(self, before: Cursor) -> Cursor:
        """Start one source anew; let several continue from their places."""
        epoch = before.epoch + 1
        if self._runs_on and before.places:
            return Cursor(epoch, 0, before.places)
        return Cursor(epoch, 0, tuple(tuple(Place(epoch) for _ in self.sources) for _ in range(self.num_streams)))

    def stream(self, start: Cursor, stream: int, allocate: Allocate) -> Iterator[Delivery]:
        """Yield the rest of a stream's batches of the epoch, from the places of `start` on."""
        places = list(start.places[stream])
        takers = [
            _Taker(source_stream, place, self.skip)
            for source_stream, place in zip(self._source_streams(stream), places, strict=True)
        ]
        first = start.batch + (stream - start.batch) % self.num_streams
        for number in range(first, self.num_batches, self.num_streams):
            yield self._delivery(start.epoch, number, takers, places, allocate)  # a waiting stream holds no batch

    def _delivery(
        self, epoch: int, number: int, takers: Sequence["_Taker"], places: list[Place], allocate: Allocate
    ) -> Delivery:
        """Read one batch of a stream, and move its places."""
        lost: Counter[Cause] = Counter()
        last_error = ""
        batches: dict[int, Batch] = {}
        jpegs: dict[int, JpegBatch | None] = {}
        for k, count in enumerate(self.mixture.counts(epoch, number, self.batch_size, self.clock)):
            if not count:
                continue
            collate = self.sources[k].collate
            rows = collate.image_rows(count, allocate)
            samples: list[Decoded] = []
            num_fresh = 0
            skipped: list[int] = []  # rows
            while len(samples) < count:
                places[k], sample = takers[k].take(None if rows is None else rows[len(samples)])
                if isinstance(sample, Decoded):
                    if sample is SKIPPED:
                        skipped.append(len(samples))
                    samples.append(sample)
                    num_fresh += places[k].lap == 0
                    continue
                # replacements meet the losses of the first pass again; these are counted already
                lost[self._accept_loss(sample).cause] += 1 if places[k].lap == 0 else 0
                last_error = sample.message
            for row, stand_in in zip(skipped, takers[k].stand_ins(places[k], rows, skipped), strict=True):
                samples[row] = stand_in
            batches[k] = collate.make_batch(samples, rows)
            jpegs[k] = collate.pack_jpegs(samples, num_fresh)
        batch, images = join_batches(batches, [source.name for source in self.sources]), _join_jpegs(batches, jpegs)
        if self.bad_batches is not None:
            batch = self.bad_batches.spoil(batch, self.clock.step(epoch, number), self.seed)
        return Delivery(batch, tuple(places), dict(+lost), last_error, images)

    @property
    def _runs_on(self) -> bool:
        return len(self.sources) > 1 or self.num_batches != self._batches_per_pass

    @property
    def _batches_per_pass(self) -> int:
        num_samples = sum(source.num_samples for source in self.sources)
        return train_batches(num_samples, self.batch_size, self.rank.world_size)

    def _source_streams(self, stream: int) -> Iterator[SourceStream]:
        rank = self.rank
        reader = f"{rank.index}/{rank.world_size}/{stream}/{self.num_streams}"
        for source in self.sources:
            if self._runs_on:
                sample_range = running_range(source.num_samples, rank, stream, self.num_streams)
            else:
                sample_range = train_range(self.num_batches, self.batch_size, rank.index, stream, self.num_streams)
            yield SourceStream(source, sample_range, self.shuffle_buffer, self.seed, reader, self._runs_on)


class _Taker:
    """Takes samples from a stream and decodes them, while any can be used."""

    def __init__(self, source_stream: SourceStream, start: Place, skip: frozenset[str]) -> None:
        self._stream = source_stream
        self._skip = skip
        self._samples = source_stream.samples(start)
        self._lost_in_a_row = 0

    def take(self, into: Tensor | None) -> tuple[Place, Decoded | Lost]:
        """Return the next sample, or SKIPPED, and the place after it. into: a row of a batch for its image."""
        place, raw = next(self._samples)
        if self._is_skipped(raw):
            return place, SKIPPED
        sample = self._stream.source.decode(raw, into, self._stream.draw(place))
        if isinstance(sample, Decoded):
            self._lost_in_a_row = 0
            return place, sample
        self._lost_in_a_row += 1
        if self._lost_in_a_row > len(self._stream.sample_range):
            raise UserError(
                f"none of the {len(self._stream.sample_range)} samples that one of data.num_streams reads from "
                f"{self._stream.source.name} is usable; the last error: {sample.message}"
            )
        return place, sample

    def stand_ins(self, place: Place, rows_BRYX: Tensor | None, skipped: Sequence[int]) -> Iterator[Decoded]:
        """Yield a sample from `place` on for each of the skipped rows.

        Raises:
            UserError: the stream has no other sample.
        """
        waiting = list(skipped)
        # two laps: the rest of this one may hold none
        later = islice(self._stream.samples(place), 2 * len(self._stream.sample_range)) if skipped else ()
        for after, raw in later:
            if self._is_skipped(raw):
                continue
            into = None if rows_BRYX is None else rows_BRYX[waiting[0]]
            sample = self._stream.source.decode(raw, into, self._stream.draw(after))
            if isinstance(sample, Decoded):
                yield sample
                waiting.pop(0)
            if not waiting:
                return
        if waiting:
            raise UserError(
                f"data.skip leaves none of the {len(self._stream.sample_range)} samples that one of data.num_streams "
                f"reads from {self._stream.source.name}: name fewer"
            )

    def _is_skipped(self, raw: RawSample | Lost) -> bool:
        return isinstance(raw, RawSample) and raw.key in self._skip


def _join_jpegs(batches: dict[int, Batch], jpegs: dict[int, JpegBatch | None]) -> JpegBatch | None:
    """Join the sources' JPEGs in the order of the joined batch."""
    return JpegBatch.join([images for k in order_sources(batches) if (images := jpegs[k]) is not None])


def _names(sources: Sequence[OpenSource]) -> str:
    return " + ".join(source.name for source in sources)
