"""Readers: from a place in an epoch to every batch that follows it, on one rank.

A reader has no state: what it yields is a function of seed, epoch, rank, number of logical streams and the places it
starts at, so an interrupted run goes on with exactly the batches that were to come, with whatever number of processes.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from lightning_moevlm.errors import UserError
from lightning_moevlm.records import Batch
from lightning_moevlm.shards.collate import Decoded
from lightning_moevlm.shards.encoded_images import EncodedImages
from lightning_moevlm.shards.faults import Cause, Lost, untolerated
from lightning_moevlm.shards.line import Line, OpenSource, Place
from lightning_moevlm.shards.mixture import Mixture, Pace, in_order, joined
from lightning_moevlm.shards.order import (
    Rank,
    Stretch,
    fixed_batches,
    fixed_number,
    fixed_stretch,
    running_stretch,
    train_batches,
    train_stretch,
)
from lightning_moevlm.shards.rooms import Allocate, Parcel
from lightning_moevlm.shards.source import RawSample
from lightning_moevlm.shards.whole_steps import whole_steps

Places = tuple[tuple[Place, ...], ...]
"""Where every stream stands in every source."""

READING = "the reading of an epoch, set by trainer.accumulate_grad_batches,"
BY_EPOCHS, OVER_EPOCHS = "up to its end", "over its end, as its batches make no whole steps"


@dataclass(frozen=True)
class Cursor:
    """A place in the order: `batch` batches of epoch number `epoch` have been handed out on this rank."""

    epoch: int
    batch: int
    places: Places = ()


class Delivery(NamedTuple):
    """A batch on its way to the loader. places: of its stream after it. lost: what its stream met on the way to it.

    encoded: the pictures, where they are to be decoded on the device; those of the batch are on the meta device.
    parcel: where the batch's tensors lie that it comes without.
    """

    batch: Batch
    places: tuple[Place, ...]
    lost: dict[Cause, int]
    last_words: str
    encoded: EncodedImages | None = None
    parcel: Parcel | None = None

    def pin_memory(self) -> "Delivery":
        """Return the same in memory that a GPU can read from; torch's DataLoader asks for it."""
        tensors: dict[str, Any] = {
            name: value.pin_memory()
            for name, value in self.batch._asdict().items()
            if isinstance(value, Tensor) and not value.is_meta
        }
        encoded = None if self.encoded is None else self.encoded.pinned()
        return self._replace(batch=self.batch._replace(**tensors), encoded=encoded)


@dataclass(frozen=True)
class Failure:
    """A user's mistake found in a worker; it travels as data, so that its one line arrives unharmed."""

    message: str


class Reader(ABC):
    """Reads for one rank; each batch comes from the logical stream batch mod `num_streams`.

    tolerant: whether samples may be lost; if not, the first ends the run.
    """

    sources: tuple[OpenSource, ...]
    rank: Rank
    num_streams: int
    tolerant: bool
    batch_size: int

    @property
    def bytes_per_batch(self) -> int:
        """Of the tensors of a batch, at most."""
        return self.batch_size * max(source.collate.bytes_per_sample for source in self.sources)

    @property
    @abstractmethod
    def num_batches(self) -> int:
        """Batches of one epoch on this rank."""

    @property
    def may_be_empty(self) -> bool:
        """Whether a batch may have lost all its samples."""
        return False

    @property
    @abstractmethod
    def order(self) -> dict[str, object]:
        """All that the order of batches depends on, as plain values."""

    @abstractmethod
    def next_epoch(self, before: Cursor) -> Cursor:
        """Return where the epoch after `before` starts."""

    @abstractmethod
    def stream(self, start: Cursor, stream: int, allocate: Allocate) -> Iterator[Delivery]:
        """Yield what one stream still has to give from `start` on. allocate: for the pictures of each batch.

        Raises:
            UserError: if samples are lost that may not be, or nothing is left.

        """

    def _met(self, lost: Lost) -> Lost:
        if not self.tolerant:
            raise untolerated(lost)
        return lost


@dataclass(frozen=True)
class TrainReader(Reader):
    """Whole batches in a new order every epoch, equally many on every rank.

    One source is read in epochs: each of its samples at most once, less than a batch per rank left out, and lost
    samples replaced from a second pass. Several sources run on over the ends of epochs, each with its own epoch; an
    epoch of the mixture has as many samples as all of them. So does one source whose batches do not make whole
    optimiser steps: an epoch is then of as many batches as do, and the rest comes in the next one.

    batch_size: samples per rank and step. shuffle_buffer: samples per stream and source to choose the next one from.
    """

    sources: tuple[OpenSource, ...]
    mixture: Mixture
    batch_size: int
    rank: Rank
    shuffle_buffer: int
    seed: int
    num_streams: int
    pace: Pace
    tolerant: bool

    def __post_init__(self) -> None:
        ranks, num_samples = self.rank.world_size, sum(source.num_samples for source in self.sources)
        if self._batches_at_hand == 0:
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
        return whole_steps(self._batches_at_hand, self.pace.batches_per_step)

    @property
    def order(self) -> dict[str, object]:
        """All that places depend on; weights may be changed, and count from the next batch on."""
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
        return {**order, **asdict(self.pace)} if self.mixture.changes else order

    def next_epoch(self, before: Cursor) -> Cursor:
        """Start anew with one source; several run on from where they are."""
        epoch = before.epoch + 1
        if self._runs_on and before.places:
            return Cursor(epoch, 0, before.places)
        return Cursor(epoch, 0, tuple(tuple(Place(epoch) for _ in self.sources) for _ in range(self.num_streams)))

    def stream(self, start: Cursor, stream: int, allocate: Allocate) -> Iterator[Delivery]:
        """Yield the rest of a stream's batches of the epoch; `places` of the start say where in the sources."""
        places = list(start.places[stream])
        takers = [_Taker(line, place) for line, place in zip(self._lines(stream), places, strict=True)]
        first = start.batch + (stream - start.batch) % self.num_streams
        for number in range(first, self.num_batches, self.num_streams):
            yield self._delivery(start.epoch, number, takers, places, allocate)  # a stream that waits holds no batch

    def _delivery(
        self, epoch: int, number: int, takers: Sequence["_Taker"], places: list[Place], allocate: Allocate
    ) -> Delivery:
        """Fill one batch of a stream, and move its places on."""
        lost: Counter[Cause] = Counter()
        last_words = ""
        batches: dict[int, Batch] = {}
        encoded: dict[int, EncodedImages | None] = {}
        for k, count in enumerate(self.mixture.counts(epoch, number, self.batch_size, self.pace)):
            if not count:
                continue
            collate = self.sources[k].collate
            rows = collate.image_rows(count, allocate)
            samples: list[Decoded] = []
            num_fresh = 0
            while len(samples) < count:
                places[k], sample = takers[k].take(None if rows is None else rows[len(samples)])
                if isinstance(sample, Decoded):
                    samples.append(sample)
                    num_fresh += places[k].lap == 0
                    continue
                # filling up meets the losses of the first pass again: they are counted already
                lost[self._met(sample).cause] += 1 if places[k].lap == 0 else 0
                last_words = sample.message
            batches[k] = collate.batch(samples, rows)
            encoded[k] = collate.encoded(samples, num_fresh)
        batch, images = joined(batches, len(self.sources)), _joined_images(batches, encoded)
        return Delivery(batch, tuple(places), dict(+lost), last_words, images)

    @property
    def _runs_on(self) -> bool:
        return len(self.sources) > 1 or self.num_batches != self._batches_at_hand

    @property
    def _batches_at_hand(self) -> int:
        num_samples = sum(source.num_samples for source in self.sources)
        return train_batches(num_samples, self.batch_size, self.rank.world_size)

    def _lines(self, stream: int) -> Iterator[Line]:
        rank = self.rank
        reader = f"{rank.index}/{rank.world_size}/{stream}/{self.num_streams}"
        for source in self.sources:
            if self._runs_on:
                stretch = running_stretch(source.num_samples, rank, stream, self.num_streams)
            else:
                stretch = train_stretch(self.num_batches, self.batch_size, rank.index, stream, self.num_streams)
            yield Line(source, stretch, self.shuffle_buffer, self.seed, reader, self._runs_on)


@dataclass(frozen=True)
class FixedReader(Reader):
    """Every sample of every source once, unshuffled, source after source; a batch is of one source.

    Every rank has equally many batches, all of nearly equal size (at most `batch_size`). Streams read neighbouring
    samples, so with several streams batches alternate between as many places of the split.
    """

    sources: tuple[OpenSource, ...]
    batch_size: int
    rank: Rank
    num_streams: int
    tolerant: bool

    def __post_init__(self) -> None:
        for source, batches in zip(self.sources, self._batches, strict=True):
            if source.num_samples == 0:
                raise UserError(
                    f"the split of {source.name} to evaluate on is empty; make the set anew, with more samples"
                )
            if batches == 0:
                raise UserError(
                    f"source {source.name} has {source.num_samples} samples to evaluate on, less than one for each of "
                    f"{self.rank.world_size} ranks; use fewer ranks, or build a larger set"
                )

    @property
    def num_batches(self) -> int:
        """Batches of all sources on this rank."""
        return sum(self._batches)

    @property
    def may_be_empty(self) -> bool:
        """Without a second pass, nothing takes the place of what was lost."""
        return self.tolerant

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
        """Start anew."""
        return Cursor(before.epoch + 1, 0)

    def stream(self, start: Cursor, stream: int, allocate: Allocate) -> Iterator[Delivery]:
        """Yield the stream's batches; one that has lost all its samples is empty."""
        offset = 0
        for k, batches in enumerate(self._batches):
            own = [batch for batch in range(batches) if (offset + batch) % self.num_streams == stream]
            own = [batch for batch in own if offset + batch >= start.batch]
            offset += batches
            if own:
                yield from self._of_source(k, [self._stretch(k, batch) for batch in own], allocate)

    def _of_source(self, k: int, stretches: Sequence[Stretch], allocate: Allocate) -> Iterator[Delivery]:
        source = self.sources[k]
        whole = Stretch(stretches[0].start, stretches[-1].stop)
        assert len(whole) == sum(map(len, stretches)), "a stream reads without gaps"
        arriving = source.arriving(source.pieces(whole, tuple(range(len(source.shards)))), set())
        for stretch in stretches:
            yield self._delivery(k, islice(arriving, len(stretch)), len(stretch), allocate)

    def _delivery(
        self, k: int, arriving: Iterator[tuple[int, RawSample | Lost]], num_samples: int, allocate: Allocate
    ) -> Delivery:
        source = self.sources[k]
        rows = source.collate.image_rows(num_samples, allocate)
        samples: list[Decoded] = []
        lost: list[Lost] = []
        for _, raw in arriving:
            sample = source.decoded(raw, None if rows is None else rows[len(samples)])
            if isinstance(sample, Decoded):
                samples.append(sample)
            else:
                lost.append(self._met(sample))
        batches: dict[int, Batch] = {}
        if samples:
            batches[k] = source.collate.batch(samples, None if rows is None else rows[: len(samples)])
        causes = Counter(sample.cause for sample in lost)
        last_words = lost[-1].message if lost else ""
        images = source.collate.encoded(samples, len(samples))
        return Delivery(joined(batches, len(self.sources)), (), dict(causes), last_words, images)

    @property
    def _batches(self) -> tuple[int, ...]:
        sizes = [source.num_samples for source in self.sources]
        return tuple(fixed_batches(size, self.batch_size, self.rank.world_size) for size in sizes)

    def _stretch(self, k: int, batch: int) -> Stretch:
        number = fixed_number(batch, self._batches[k], self.num_streams)
        return fixed_stretch(self.sources[k].num_samples, self._batches[k], self.rank, number)


class _Taker:
    """Takes from a line and decodes, as long as there is something left that can be used."""

    def __init__(self, line: Line, start: Place) -> None:
        self._line = line
        self._samples = line.samples(start)
        self._lost_in_a_row = 0

    def take(self, into: Tensor | None) -> tuple[Place, Decoded | Lost]:
        """Return the next sample and the place after it. into: a row of a batch, for its picture."""
        place, raw = next(self._samples)
        sample = self._line.source.decoded(raw, into, self._line.draw(place))
        if isinstance(sample, Decoded):
            self._lost_in_a_row = 0
            return place, sample
        self._lost_in_a_row += 1
        if self._lost_in_a_row > len(self._line.stretch):
            raise UserError(
                f"none of the {len(self._line.stretch)} samples that a stream should read of "
                f"{self._line.source.name} can be used: {sample.message}"
            )
        return place, sample


def _joined_images(batches: dict[int, Batch], encoded: dict[int, EncodedImages | None]) -> EncodedImages | None:
    """Put the sources' JPEGs together in the order of the joined batch."""
    return EncodedImages.joined([images for k in in_order(batches) if (images := encoded[k]) is not None])


def _names(sources: Sequence[OpenSource]) -> str:
    return " + ".join(source.name for source in sources)
