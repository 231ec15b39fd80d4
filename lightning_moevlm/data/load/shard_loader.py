"""A loader that knows where it is: sized, resumable to the batch, in a new order every epoch.

Its state lives in the main process: epoch, batches handed out, and where every logical stream stands in every source,
which each batch brings along. Snapshots of workers (as torchdata's StatefulDataLoader takes) run ahead of the training
by what is prefetched, are bound to the number of workers, and are gone when the workers are; here what is prefetched is
simply not part of the state, and a run may go on with another number of workers. The same holds for what a device stage
has prepared ahead: place and counts move when a batch is handed out, and not before. Lightning saves and restores it
with the training state, because it offers `state_dict` and `load_state_dict` and has a length.

Places differ between ranks once samples were lost, so the state holds those of all ranks, and saving is something that
all ranks do (as they do in Lightning).

An iteration that hands out nothing does not count as an epoch, and a state saved after an epoch's last batch goes on
with the next epoch.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.format.faults import Cause
from lightning_moevlm.data.images.allocation import private_bytes, shared_bytes
from lightning_moevlm.data.load.buffer_pool import BufferPool, unpack
from lightning_moevlm.data.load.device_stage import DeviceStage
from lightning_moevlm.data.load.steps_ahead import look_ahead
from lightning_moevlm.data.load.worker_stream import WorkerStream
from lightning_moevlm.data.read.reader import BY_EPOCHS, READING, Cursor, Delivery, Failure, Places, Reader
from lightning_moevlm.data.read.source_stream import Place

_JUDGED_FROM = 1000
"""Samples over which the first losses are judged, so that one bad sample at the start is not a share of one."""

_NUM_BUFFERS = 4
"""Per worker: two batches that its loader has ordered ahead, the one that is used, and the one that comes after it."""


class RankState(TypedDict):
    """What differs between ranks. places: (epoch, lap, taken) of every stream and source. lost: samples by cause."""

    places: list[list[list[int]]]
    lost: dict[str, int]


class LoaderState(TypedDict):
    """Where a loader is, as plain values. order: all that the order of batches depends on.

    samples: handed out so far on this rank, by source. texts: how many of them have one, and in how many it is cut.
    ranks: by number of the rank.
    """

    epoch: int
    batch: int
    samples: list[int]
    texts: list[int]
    ranks: dict[int, RankState]
    order: dict[str, object]


class ShardLoader:
    """Iterates over a reader's batches, with `num_workers` processes or none.

    digest: names the exact data. batches_per_epoch: where an epoch ends if the trainer uses fewer batches than there
    are. max_lost_fraction: share of the samples read that may be lost. stage: what happens to batches in this process
    before they are handed out; null hands them out as they come. per_step: batches that make an optimiser step, each of
    which knows the others.

    Raises:
        UserError: if the streams cannot be shared out evenly among the workers.
    """

    def __init__(
        self,
        reader: Reader,
        num_workers: int,
        digest: str = "",
        batches_per_epoch: int | None = None,
        max_lost_fraction: float = 0.0,
        stage: DeviceStage | None = None,
        per_step: int = 1,
    ) -> None:
        refuse_uneven_workers(num_workers, reader.num_streams)
        self._reader = reader
        self._num_workers = num_workers
        self._digest = digest
        self._batches_per_epoch = min(reader.num_batches, batches_per_epoch or reader.num_batches)
        self._max_lost_fraction = max_lost_fraction
        self._stage = stage
        self._per_step = per_step
        self._cursor = reader.next_epoch(Cursor(-1, 0))
        self._resume_here = True
        self.samples = [0] * len(reader.sources)
        self.num_texts, self.num_cut = 0, 0
        self.lost: Counter[Cause] = Counter()

    @property
    def source_names(self) -> tuple[str, ...]:
        """What `samples` counts."""
        return tuple(source.name for source in self._reader.sources)

    @property
    def tolerates_losses(self) -> bool:
        """Whether losses are counted and tolerated, within a limit."""
        return self._max_lost_fraction > 0

    @property
    def source_epochs(self) -> tuple[float, ...]:
        """How often each source has been read, over all ranks."""
        world_size = self._reader.rank.world_size
        return tuple(
            samples * world_size / source.num_samples
            for samples, source in zip(self.samples, self._reader.sources, strict=True)
        )

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        return self._reader.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Hand out the rest of a resumed epoch, else the next epoch.

        Raises:
            UserError: if more samples are lost than may be.

        """
        self._cursor = self._next_start()
        self._resume_here = False
        arriving = self._read(self._cursor)
        before = Counter(self.lost)
        staged = arriving if self._stage is None else self._stage(arriving, self._cursor)
        for delivery in look_ahead(staged, self._cursor.batch, self._per_step) if self._per_step > 1 else staged:
            if isinstance(delivery, Failure):
                raise UserError(delivery.message)
            self._take(delivery)
            if self._cursor.batch == self._batches_per_epoch and self.lost != before:
                warnings.warn(f"samples lost in this epoch: {_describe_losses(self.lost - before)}", stacklevel=2)
            yield delivery.batch

    def _pools(self) -> list[BufferPool]:
        """Return rooms for this process, or for each of its workers."""
        num_bytes = self._reader.bytes_per_batch
        if self._num_workers == 0:
            return [BufferPool(_NUM_BUFFERS, num_bytes, private_bytes)]
        if self._pins:  # which torch's loader does with what it receives, and it cannot see into rooms
            return [BufferPool(0, num_bytes, private_bytes)] * self._num_workers
        return [BufferPool(_NUM_BUFFERS, num_bytes, shared_bytes) for _ in range(self._num_workers)]

    @property
    def _pins(self) -> bool:
        return self._stage is not None and self._stage.device.type == "cuda"

    def _read(self, start: Cursor) -> Iterator[Delivery | Failure]:
        pools = self._pools()
        loader: DataLoader[Delivery | Failure] = DataLoader(
            WorkerStream(self._reader, start, self._reader.num_batches, pools),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_keep,
            pin_memory=self._pins,
        )
        return _unpack_all(loader, pools)

    def _take(self, delivery: Delivery) -> None:
        """Move on to the place behind a batch, and count."""
        batch, places = self._cursor.batch, self._cursor.places
        if places:
            stream = batch % self._reader.num_streams
            places = (*places[:stream], delivery.places, *places[stream + 1 :])
        self._cursor = replace(self._cursor, batch=batch + 1, places=places)
        self.samples = [before + more for before, more in zip(self.samples, delivery.batch.per_source, strict=True)]
        self.num_texts += len(delivery.batch.text_keys)
        self.num_cut += delivery.batch.num_cut
        if not delivery.lost:
            return
        self.lost.update(delivery.lost)
        read, own = sum(self.samples) + self.lost.total(), sum(source.num_samples for source in self._reader.sources)
        judged = max(read, min(_JUDGED_FROM, own // self._reader.rank.world_size))
        if self.lost.total() > self._max_lost_fraction * judged:
            raise UserError(
                f"{self.lost.total()} of {read} samples read could not be used ({_describe_losses(self.lost)}), more "
                f"than data.max_lost_fraction {self._max_lost_fraction} allows; the last: {delivery.last_error}"
            )

    def _next_start(self) -> Cursor:
        finished = self._cursor.batch >= self._batches_per_epoch
        if finished or (self._cursor.batch > 0 and not self._resume_here):
            return self._reader.next_epoch(self._cursor)
        return self._cursor

    def state_dict(self) -> LoaderState:
        """Return the place, and all that the order of batches depends on; all ranks must ask together."""
        places = [[list(place) for place in stream] for stream in self._cursor.places]
        own = RankState(places=places, lost={str(cause): count for cause, count in self.lost.items()})
        return LoaderState(
            epoch=self._cursor.epoch,
            batch=self._cursor.batch,
            samples=list(self.samples),
            texts=[self.num_texts, self.num_cut],
            ranks=self._gather_ranks(own),
            order=self._order(),
        )

    def load_state_dict(self, state_dict: LoaderState) -> None:
        """Go on from a saved place, with any number of workers.

        Raises:
            UserError: if the order of batches would not be the one that the place was counted in.

        """
        saved = {READING: BY_EPOCHS} | state_dict.get("order", {})  # older versions knew no other
        for name, now in self._order().items():
            then = saved.get(name)
            if then != now:
                raise UserError(
                    f"cannot resume the data: {name} was {then} in the checkpoint, now it is {now}, "
                    "and batches would come in another order; restore it, or start from the weights alone"
                )
        rank = self._reader.rank.index
        if rank not in state_dict["ranks"]:
            raise UserError(
                f"cannot resume the data: the checkpoint was saved by rank {', '.join(map(str, state_dict['ranks']))} "
                f"alone and rank {rank} has no place in it; save with all ranks, or start from the weights alone"
            )
        own = state_dict["ranks"][rank]
        places: Places = tuple(tuple(Place(*place) for place in stream) for stream in own["places"])
        self._cursor = Cursor(int(state_dict["epoch"]), int(state_dict["batch"]), places)
        self.samples = list(state_dict["samples"])
        self.num_texts, self.num_cut = state_dict.get("texts", [0, 0])  # older checkpoints do not count them
        self.lost = Counter(own["lost"])  # type: ignore[arg-type]  # written by `state_dict`
        self._resume_here = True

    def _gather_ranks(self, own: RankState) -> dict[int, RankState]:
        rank = self._reader.rank
        if rank.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return {rank.index: own}
        states: list[Any] = [None] * rank.world_size
        dist.all_gather_object(states, own)
        return dict(enumerate(states))

    def _order(self) -> dict[str, object]:
        return {"manifest_digest": self._digest, **self._reader.order}


def refuse_uneven_workers(num_workers: int, num_streams: int) -> None:
    """Refuse workers that cannot share out the streams evenly.

    Raises:
        UserError: with the numbers that can.
    """
    if num_workers and num_streams % num_workers:
        even = [str(number) for number in range(1, num_streams + 1) if num_streams % number == 0]
        raise UserError(
            f"data.num_workers is {num_workers}, which does not divide data.num_streams {num_streams}: give 0, "
            f"{', '.join(even)} workers, or a multiple of {num_workers} as num_streams (another order of samples)"
        )


def _describe_losses(lost: Counter[Cause]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in sorted(lost.items()))


def _unpack_all(deliveries: Iterable[Delivery | Failure], pools: Sequence[BufferPool]) -> Iterator[Delivery | Failure]:
    for item in deliveries:
        if isinstance(item, Delivery) and item.pooled is not None:
            yield item._replace(batch=unpack(item.batch, item.pooled, pools), pooled=None)
        else:
            yield item


def _keep(batch: Any) -> Any:
    return batch  # the default would turn the tuple of keys into a list
