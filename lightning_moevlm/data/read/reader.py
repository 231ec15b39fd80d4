"""Readers: from a place in an epoch to every batch that follows it, on one rank.

A reader has no state: what it yields is a function of seed, epoch, rank, number of logical streams and the places it
starts at, so an interrupted run goes on with exactly the batches that were to come, with whatever number of processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.format.faults import Cause, Lost, lost_sample_error
from lightning_moevlm.data.images.allocation import Allocate
from lightning_moevlm.data.images.jpeg_batch import JpegBatch
from lightning_moevlm.data.read.sample_order import (
    Rank,
)
from lightning_moevlm.data.read.source_stream import OpenSource, Place
from lightning_moevlm.data.read.tensor_slots import PooledBatch

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

    jpegs: the images, where they are to be decoded on the device; those of the batch are on the meta device.
    parcel: where the batch's tensors lie that it comes without.
    """

    batch: Batch
    places: tuple[Place, ...]
    lost: dict[Cause, int]
    last_error: str
    jpegs: JpegBatch | None = None
    pooled: PooledBatch | None = None

    def pin_memory(self) -> "Delivery":
        """Return the same in memory that a GPU can read from; torch's DataLoader asks for it."""
        tensors: dict[str, Any] = {
            name: value.pin_memory()
            for name, value in self.batch._asdict().items()
            if isinstance(value, Tensor) and not value.is_meta
        }
        jpegs = None if self.jpegs is None else self.jpegs.pin()
        return self._replace(batch=self.batch._replace(**tensors), jpegs=jpegs)


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
    @abstractmethod
    def order(self) -> dict[str, object]:
        """All that the order of batches depends on, as plain values."""

    @abstractmethod
    def next_epoch(self, before: Cursor) -> Cursor:
        """Return where the epoch after `before` starts."""

    @abstractmethod
    def stream(self, start: Cursor, stream: int, allocate: Allocate) -> Iterator[Delivery]:
        """Yield what one stream still has to give from `start` on. allocate: for the images of each batch.

        Raises:
            UserError: if samples are lost that may not be, or nothing is left.

        """

    def _accept_loss(self, lost: Lost) -> Lost:
        if not self.tolerant:
            raise lost_sample_error(lost)
        return lost
