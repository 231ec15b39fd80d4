"""Loads batches with a known position: sized, resumable to the batch, in a new order every epoch.

The state is kept in the main process: epoch, batches handed out, and the place of each logical stream in each source,
which comes with each batch. Snapshots of workers (torchdata's StatefulDataLoader) run ahead of training by the
prefetched batches, are bound to the number of workers, and are lost with them. Here prefetched batches are not part of
the state, so a run can resume with another number of workers. The same holds for batches that a device stage has
prepared. Lightning saves and restores the state, because the loader has `state_dict`, `load_state_dict` and a length.

Places differ between ranks after losses, so the state holds those of all ranks, and all ranks save together, as they do
in Lightning.

An iteration without a batch does not count as an epoch. A state saved after an epoch's last batch resumes with the next
epoch.
"""

import time
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
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
"""Samples that the first losses are compared with, so that one bad sample at the start is not 100 %."""

_NUM_BUFFERS = 4
"""Per worker: two batches that torch's loader requests in advance, the one in use, and the next one."""


class RankState(TypedDict):
    """The part of the state that differs between ranks."""

    places: list[list[list[int]]]  # (epoch, lap, taken) by stream and source
    lost: dict[str, int]  # samples by cause


class LoaderState(TypedDict):
    """The place of a loader, as plain values."""

    epoch: int
    batch: int  # batches of the epoch handed out
    samples: list[int]  # handed out so far on this rank, by source
    texts_by_source: list[list[int]]  # samples among them with a text, and those whose text was cut
    ranks: dict[int, RankState]  # by number of the rank
    order: dict[str, object]  # all that the order of batches depends on


class ShardLoader:
    """Iterates over a reader's batches.

    Args:
        reader: Reads the batches.
        num_workers: Processes that read; 0 reads in this process.
        digest: Names the exact data.
        batches_per_epoch: Length of the trainer's epochs, if it is shorter than the reader's.
        max_lost_fraction: Fraction of the samples read that may be lost.
        stage: Prepares batches in this process before they are handed out; None hands them out unchanged.
        per_step: Batches per optimiser step, each of which knows the others.

    Raises:
        UserError: if the workers cannot share the streams evenly.
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
        self.num_texts, self.num_cut = [0] * len(reader.sources), [0] * len(reader.sources)
        self.lost: Counter[Cause] = Counter()
        self.waited_seconds = 0.0  # of this process for batches, decoding that it does itself included

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources that `samples` counts."""
        return tuple(source.name for source in self._reader.sources)

    @property
    def tolerates_losses(self) -> bool:
        """Whether losses are counted and tolerated, up to a limit."""
        return self._max_lost_fraction > 0

    @property
    def source_epochs(self) -> tuple[float, ...]:
        """Epochs of each source, over all ranks."""
        world_size = self._reader.rank.world_size
        return tuple(
            samples * world_size / source.num_samples
            for samples, source in zip(self.samples, self._reader.sources, strict=True)
        )

    def __len__(self) -> int:
        """Return the batches of one epoch on this rank."""
        return self._reader.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Hand out the rest of a resumed epoch, else the next epoch.

        Raises:
            UserError: if more samples are lost than `max_lost_fraction` allows.
        """
        self._cursor = self._next_start()
        self._resume_here = False
        before = Counter(self.lost)
        # closed here, also after an error, whose traceback keeps this frame: workers of an iterator that the garbage
        # collector finds are not asked to end, since their queues go first, and each is waited for 5 s
        with closing(self._read(self._cursor)) as arriving:
            staged = arriving if self._stage is None else self._stage(arriving, self._cursor)
            ahead = look_ahead(staged, self._cursor.batch, self._per_step) if self._per_step > 1 else staged
            for delivery in self._clock(iter(ahead)):
                if isinstance(delivery, Failure):
                    raise UserError(delivery.message)
                self._take(delivery)
                if self._cursor.batch == self._batches_per_epoch and self.lost != before:
                    text = f"samples lost in this epoch: {_describe_losses(self.lost - before)}"
                    warnings.warn(text, stacklevel=2)
                yield delivery.batch

    def _pools(self) -> list[BufferPool]:
        """Return a pool for this process, or for each of its workers."""
        num_bytes = self._reader.bytes_per_batch
        if self._num_workers == 0:
            return [BufferPool(_NUM_BUFFERS, num_bytes, private_bytes)]
        if self._pins:  # torch's loader pins what it receives, and cannot see into buffers
            return [BufferPool(0, num_bytes, private_bytes)] * self._num_workers
        return [BufferPool(_NUM_BUFFERS, num_bytes, shared_bytes) for _ in range(self._num_workers)]

    @property
    def _pins(self) -> bool:
        return self._stage is not None and self._stage.device.type == "cuda"

    def _read(self, start: Cursor) -> Generator[Delivery | Failure]:
        pools = self._pools()
        loader: DataLoader[Delivery | Failure] = DataLoader(
            WorkerStream(self._reader, start, self._reader.num_batches, pools),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_keep,
            pin_memory=self._pins,
        )
        return _unpack_all(loader, pools)

    def _clock(self, deliveries: Iterator[Delivery | Failure]) -> Iterator[Delivery | Failure]:
        """Hand them on, and count the time until each is there."""
        while True:
            asked = time.perf_counter()
            delivery = next(deliveries, None)
            self.waited_seconds += time.perf_counter() - asked
            if delivery is None:
                return
            yield delivery

    def _take(self, delivery: Delivery) -> None:
        """Move the place behind a batch, and count its samples."""
        batch, places = self._cursor.batch, self._cursor.places
        if places:
            stream = batch % self._reader.num_streams
            places = (*places[:stream], delivery.places, *places[stream + 1 :])
        self._cursor = replace(self._cursor, batch=batch + 1, places=places)
        counts, texts = Counter(delivery.batch.sources), Counter(delivery.batch.text_sources)
        for number, name in enumerate(self.source_names):
            self.samples[number] += counts[name]
            self.num_texts[number] += texts[name]
            self.num_cut[number] += delivery.batch.num_cut[number]
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
        """Return the place, and all that the order of batches depends on. All ranks must call this together."""
        places = [[list(place) for place in stream] for stream in self._cursor.places]
        own = RankState(places=places, lost={str(cause): count for cause, count in self.lost.items()})
        return LoaderState(
            epoch=self._cursor.epoch,
            batch=self._cursor.batch,
            samples=list(self.samples),
            texts_by_source=[list(self.num_texts), list(self.num_cut)],
            ranks=self._gather_ranks(own),
            order=self._order(),
        )

    def load_state_dict(self, state_dict: LoaderState) -> None:
        """Continue from a saved place, with any number of workers.

        Raises:
            UserError: if the order of batches differs from the one of the saved place.
        """
        saved = {READING: BY_EPOCHS} | state_dict.get("order", {})  # older versions had no other
        for name, now in self._order().items():
            then = saved.get(name)
            if then != now:
                raise UserError(
                    f"cannot resume the data: {name} was {then} in the checkpoint and is {now} now, so batches would "
                    "come in another order; restore it, or start a new run from its weights with "
                    "--model.init_from.checkpoint FILE"
                )
        rank = self._reader.rank.index
        if rank not in state_dict["ranks"]:
            raise UserError(
                f"cannot resume the data: the checkpoint was saved by rank {', '.join(map(str, state_dict['ranks']))} "
                f"alone, without the position of rank {rank}; save with all ranks, or start a new run from its weights "
                "with --model.init_from.checkpoint FILE"
            )
        own = state_dict["ranks"][rank]
        places: Places = tuple(tuple(Place(*place) for place in stream) for stream in own["places"])
        self._cursor = Cursor(int(state_dict["epoch"]), int(state_dict["batch"]), places)
        self.samples = list(state_dict["samples"])
        none = [0] * len(self.samples)  # older checkpoints do not count them
        self.num_texts, self.num_cut = map(list, state_dict.get("texts_by_source", [none, none]))
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
    """Refuse workers that cannot share the streams evenly.

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


def _unpack_all(deliveries: Iterable[Delivery | Failure], pools: Sequence[BufferPool]) -> Generator[Delivery | Failure]:
    for item in deliveries:
        if isinstance(item, Delivery) and item.pooled is not None:
            yield item._replace(batch=unpack(item.batch, item.pooled, pools), pooled=None)
        else:
            yield item


def _keep(batch: Any) -> Any:
    return batch  # the default would convert the tuple of keys to a list
