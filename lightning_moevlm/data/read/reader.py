"""Reads all batches of one rank from a place in an epoch on.

A reader has no state. Its batches depend on seed, epoch, rank, number of logical streams and the starting places, so an
interrupted run resumes with exactly the batches that were to come, with any number of processes.
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
from lightning_moevlm.data.read.sample_order import Rank
from lightning_moevlm.data.read.source_stream import Place, ReadSource
from lightning_moevlm.data.read.tensor_slots import PooledBatch

Places = tuple[tuple[Place, ...], ...]
"""Place of every stream in every source."""

READING = "the reading of an epoch, set by trainer.accumulate_grad_batches,"
BY_EPOCHS, OVER_EPOCHS = "up to its end", "over its end, as its batches make no whole steps"


@dataclass(frozen=True)
class Cursor:
    """A place in the order of a rank's batches."""

    epoch: int
    batch: int  # batches of this epoch handed out
    places: Places = ()


class Delivery(NamedTuple):
    """A batch on its way to the loader."""

    batch: Batch
    places: tuple[Place, ...]  # of its stream after it
    lost: dict[Cause, int]  # samples that its stream lost before it
    last_error: str  # message of the last loss
    jpegs: JpegBatch | None = None  # images to decode on the device; those of the batch are on the meta device
    pooled: PooledBatch | None = None  # tensors of the batch that lie in a buffer

    def pin_memory(self) -> "Delivery":
        """Return the same in pinned memory; torch's DataLoader calls this."""
        tensors: dict[str, Any] = {
            name: value.pin_memory()
            for name, value in self.batch._asdict().items()
            if isinstance(value, Tensor) and not value.is_meta
        }
        jpegs = None if self.jpegs is None else self.jpegs.pin()
        return self._replace(batch=self.batch._replace(**tensors), jpegs=jpegs)


@dataclass(frozen=True)
class Failure:
    """A `UserError` of a worker. It is sent as data, so that its message arrives unchanged."""

    message: str


class Reader(ABC):
    """Reads for one rank; batch b comes from logical stream b mod `num_streams`."""

    sources: tuple[ReadSource, ...]
    rank: Rank
    num_streams: int
    tolerant: bool  # whether samples may be lost; otherwise the first loss ends the run
    batch_size: int

    @property
    def bytes_per_batch(self) -> int:
        """Largest number of bytes of a batch's tensors."""
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
        """Return the beginning of the epoch after `before`."""

    @abstractmethod
    def stream(self, start: Cursor, stream: int, allocate: Allocate) -> Iterator[Delivery]:
        """Yield one stream's batches from `start` on. allocate: allocates the images of each batch.

        Raises:
            UserError: if a sample is lost without tolerance, or no sample is left.
        """

    def _accept_loss(self, lost: Lost) -> Lost:
        if not self.tolerant:
            raise lost_sample_error(lost)
        return lost
