"""Rooms for batches that are used again: the memory of a batch goes to a later one when nobody holds it any more.

Fresh shared memory costs a page fault per 4 KiB on either side, about as much as decoding a third of the images that
go into it; private memory of this size is handed back to the system and faulted in again as well. Here a loader has a
few rooms for as long as it is iterated over. Nothing is ever copied out: a batch lies in its room, and stays whole for
as long as it, or any view of it, is held. Who holds many batches uses the rooms up, and gets ordinary memory instead.

A worker takes a room, fills it, and sends its number in place of the tensors (a `PooledBatch`): no file descriptor, no
mapping, and no round trip from process to process per tensor, as torch's own way of sending has.

Shared memory is torch's: it has no name once it is there, so whoever is killed leaves nothing behind.
"""

import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.images.allocation import Allocate, private_bytes, shared_bytes
from lightning_moevlm.data.read.tensor_slots import PooledBatch, TensorSlot

_ALIGNMENT = 64
"""Of every tensor in a room, in bytes: a cache line."""


class BufferPool:
    """A few rooms, each for `num_bytes` of tensors of a batch.

    Only one process takes rooms, and only one, which may be the same, lends them.

    allocate: what kind of memory they are in. It is used up only by rooms that are used: the first free one is taken.
    """

    def __init__(self, num_buffers: int, num_bytes: int, allocate: Allocate) -> None:
        self.num_bytes = _align(num_bytes) + len(Batch._fields) * _ALIGNMENT  # gaps between tensors
        self._bytes_KN = allocate(num_buffers * self.num_bytes).view(num_buffers, self.num_bytes)
        self._taken_K = allocate(num_buffers).zero_()

    def take(self) -> int | None:
        """Take a free room; None if there is none."""
        free = np.flatnonzero(self._taken_K.numpy() == 0)
        if not len(free):
            return None
        self._taken_K[free[0]] = 1
        return int(free[0])

    def view_buffer(self, buffer: int) -> Tensor:
        """Return the bytes of a taken room, (num_bytes,), uint8, to be filled."""
        return self._bytes_KN[buffer]

    def lend(self, buffer: int) -> Tensor:
        """Return the bytes of a taken room, which is free again when nothing is left that shares their storage."""
        # the storage of a tensor made of an array holds that very array; however many views, detached ones and arrays
        # are made of the tensor, the array goes when the last of them goes. The count that tells so is atomic, which
        # also keeps reads of the room before the mark that frees it.
        array = self._bytes_KN[buffer].numpy()
        weakref.finalize(array, _free, self._taken_K.numpy(), buffer, os.getpid()).atexit = False
        return torch.from_numpy(array)

    def allocate(self, num_bytes: int) -> Tensor:
        """Return bytes of a room, lent; ordinary memory if they do not fit into one, or none is free."""
        buffer = self.take() if num_bytes <= self.num_bytes else None
        return private_bytes(num_bytes) if buffer is None else self.lend(buffer)[:num_bytes]

    @property
    def num_free(self) -> int:
        """How many rooms could be taken."""
        return int((self._taken_K == 0).sum())


def _free(taken_K: NDArray[np.uint8], buffer: int, lender: int) -> None:
    if os.getpid() == lender:  # a forked process has copies of the lender's objects, and drops them when it likes
        taken_K[buffer] = 0


class BatchPacker:
    """What a worker puts its batches into."""

    def __init__(self, pool: BufferPool, worker: int) -> None:
        self._pool = pool
        self._worker = worker
        self._buffer: int | None = None

    def allocate(self, num_bytes: int) -> Tensor:
        """Return the beginning of a room; shared memory if none is free, or it is too small.

        Of several parts of one batch, which are joined to another tensor, only the first lies in a room.
        """
        if self._buffer is not None:
            return private_bytes(num_bytes)
        self._buffer = self._pool.take() if num_bytes <= self._pool.num_bytes else None
        return shared_bytes(num_bytes) if self._buffer is None else self._pool.view_buffer(self._buffer)[:num_bytes]

    def pack(self, batch: Batch) -> tuple[Batch, PooledBatch | None]:
        """Put the tensors of a batch into its room, and return what is left to be sent as it is.

        What lies in the room already stays where it is. Without a free room, and where it is full, tensors stay in
        the batch.
        """
        buffer, self._buffer = self._pool.take() if self._buffer is None else self._buffer, None
        if buffer is None:
            return batch, None
        bytes_N = self._pool.view_buffer(buffer)
        tensors = {name: each for name, each in batch._asdict().items() if isinstance(each, Tensor) and each.is_cpu}
        starts = {name: each.data_ptr() - bytes_N.data_ptr() for name, each in tensors.items()}
        resolve_inside = [name for name, start in starts.items() if 0 <= start < len(bytes_N)]
        slots = {name: _make_slot(tensors[name], starts[name]) for name in resolve_inside}
        end = max((slot.stop for slot in slots.values()), default=0)
        for name in (name for name in tensors if name not in resolve_inside):
            slot = _make_slot(tensors[name], _align(end))
            if slot.stop <= len(bytes_N):
                slot.view(bytes_N).copy_(tensors[name])
                slots[name], end = slot, slot.stop
        sent: dict[str, Any] = dict.fromkeys(slots)
        return batch._replace(**sent), PooledBatch(self._worker, buffer, slots)


def unpack(batch: Batch, pooled: PooledBatch, pool: Sequence[BufferPool]) -> Batch:
    """Return a batch with the tensors of its parcel, where they lie. rooms: of every worker."""
    bytes_N = pool[pooled.worker].lend(pooled.buffer)
    tensors: dict[str, Any] = {name: slot.view(bytes_N) for name, slot in pooled.slots.items()}
    return batch._replace(**tensors)


def _make_slot(tensor: Tensor, start: int) -> TensorSlot:
    dense = torch.empty_like(tensor, device="meta")  # has the strides of a tensor without gaps in the same order
    return TensorSlot(start, tuple(tensor.shape), dense.stride(), tensor.dtype)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
