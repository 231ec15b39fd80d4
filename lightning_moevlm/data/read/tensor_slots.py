"""Describes where the tensors of a batch lie in a buffer."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TensorSlot(NamedTuple):
    """The place of a tensor in a buffer. Its elements are contiguous, in any order."""

    start: int  # bytes from the beginning of the buffer
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # elements
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        """Byte after the last."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def view(self, bytes_N: Tensor) -> Tensor:
        """Return the tensor as a view of a buffer's bytes."""
        return bytes_N[self.start : self.stop].view(self.dtype).as_strided(self.shape, self.stride)


class PooledBatch(NamedTuple):
    """The tensors of a batch on their way from a worker."""

    worker: int  # owner of the buffer
    buffer: int  # number of the buffer in the worker's pool
    slots: dict[str, TensorSlot]  # by field of the batch
