"""Reuses memory for batches: a buffer is free again when nothing refers to its batch.

New shared memory costs a page fault per 4 KiB on either side, about as much as decoding a third of its images. Private
memory of this size goes back to the system, and faults again as well. Here a loader has a few buffers while it is
iterated over. Nothing is copied out: a batch stays valid while it, or a view of it, is referred to. If many batches are
kept and all buffers are in use, new batches get ordinary memory.

A worker takes a buffer, fills it, and sends its number in place of the tensors (a `PooledBatch`): no file descriptor,
mapping or round trip per tensor, as torch needs.

Shared memory is torch's. It has no name, so killed processes leave nothing behind.
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
"""Of every tensor in a buffer, bytes: a cache line."""


class BufferPool:
    """A few buffers, each for the tensors of one batch.

    One process takes buffers, and one process, which may be the same, lends them.

    Args:
        num_buffers: Number of buffers.
        num_bytes: Bytes of the tensors of a batch.
        allocate: Allocates their memory. The first free buffer is taken, so unused ones cost nothing.
    """

    def __init__(self, num_buffers: int, num_bytes: int, allocate: Allocate) -> None:
        self.num_bytes = _align(num_bytes) + len(Batch._fields) * _ALIGNMENT  # gaps between tensors
        self._bytes_KN = allocate(num_buffers * self.num_bytes).view(num_buffers, self.num_bytes)
        self._taken_K = allocate(num_buffers).zero_()

    def take(self) -> int | None:
        """Take a free buffer and return its number; None if all are in use."""
        free = np.flatnonzero(self._taken_K.numpy() == 0)
        if not len(free):
            return None
        self._taken_K[free[0]] = 1
        return int(free[0])

    def view_buffer(self, buffer: int) -> Tensor:
        """Return the bytes of a taken buffer, (num_bytes,), uint8, to fill."""
        return self._bytes_KN[buffer]

    def lend(self, buffer: int) -> Tensor:
        """Return the bytes of a taken buffer. It is free again when nothing shares their storage."""
        # the storage of a tensor made of an array holds that array, so the array is deleted with the last view or array
        # made of the tensor. Its reference count is atomic, so reads of the buffer come before its mark as free
        array = self._bytes_KN[buffer].numpy()
        weakref.finalize(array, _free, self._taken_K.numpy(), buffer, os.getpid()).atexit = False
        return torch.from_numpy(array)

    def allocate(self, num_bytes: int) -> Tensor:
        """Lend a buffer and return its first bytes; ordinary memory if they do not fit or none is free."""
        buffer = self.take() if num_bytes <= self.num_bytes else None
        return private_bytes(num_bytes) if buffer is None else self.lend(buffer)[:num_bytes]

    @property
    def num_free(self) -> int:
        """Number of free buffers."""
        return int((self._taken_K == 0).sum())


def _free(taken_K: NDArray[np.uint8], buffer: int, lender: int) -> None:
    if os.getpid() == lender:  # a forked process has copies of the lender's objects, and deletes them at any time
        taken_K[buffer] = 0


class BatchPacker:
    """Packs a worker's batches into buffers."""

    def __init__(self, pool: BufferPool, worker: int) -> None:
        self._pool = pool
        self._worker = worker
        self._buffer: int | None = None

    def allocate(self, num_bytes: int) -> Tensor:
        """Return the beginning of a buffer; shared memory if none is free or it is too small.

        If a batch is joined from several parts, only the first lies in a buffer.
        """
        if self._buffer is not None:
            return private_bytes(num_bytes)
        self._buffer = self._pool.take() if num_bytes <= self._pool.num_bytes else None
        return shared_bytes(num_bytes) if self._buffer is None else self._pool.view_buffer(self._buffer)[:num_bytes]

    def pack(self, batch: Batch) -> tuple[Batch, PooledBatch | None]:
        """Move the tensors of a batch into its buffer, and return the batch without them.

        Tensors that lie in the buffer already are not moved. Tensors stay in the batch if no buffer is free or it is
        full.
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


def unpack(batch: Batch, pooled: PooledBatch, pools: Sequence[BufferPool]) -> Batch:
    """Return a batch with its tensors, as views of the buffer. pools: one of each worker."""
    bytes_N = pools[pooled.worker].lend(pooled.buffer)
    tensors: dict[str, Any] = {name: slot.view(bytes_N) for name, slot in pooled.slots.items()}
    return batch._replace(**tensors)


def _make_slot(tensor: Tensor, start: int) -> TensorSlot:
    dense = torch.empty_like(tensor, device="meta")  # its strides are those of a tensor without gaps, in the same order
    return TensorSlot(start, tuple(tensor.shape), dense.stride(), tensor.dtype)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
