"""Describes where the tensors of a batch lie in a buffer."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TensorSlot(NamedTuple):
    """Where a tensor lies in a room. start: in bytes. Its elements fill a stretch without gaps, in some order."""

    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        """The byte after the last."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def view(self, bytes_N: Tensor) -> Tensor:
        """Return the tensor that lies there in the bytes of a room."""
        return bytes_N[self.start : self.stop].view(self.dtype).as_strided(self.shape, self.stride)


class PooledBatch(NamedTuple):
    """The tensors of a batch on their way from a worker. worker: whose room it is. spots: by field of the batch."""

    worker: int
    buffer: int
    slots: dict[str, TensorSlot]
