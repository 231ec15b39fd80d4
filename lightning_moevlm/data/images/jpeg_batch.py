"""Packs the JPEGs of a batch into one tensor of bytes, on their way from a loader's process to the device.

A worker sends two tensors in shared memory for any number of images, and one copy pins them for the GPU. Each image
keeps its name, because the device may find it broken long after its shard was read.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from lightning_moevlm.data.images.allocation import private_bytes, shared_bytes


class Jpeg(NamedTuple):
    """An encoded image."""

    data: bytes
    name: str  # its member and shard, for messages


class JpegBatch(NamedTuple):
    """Encoded images of a batch, in its order, on the CPU."""

    bytes_N: Tensor  # uint8, one JPEG after another
    offsets_M: Tensor  # int64, beginning of each of the M - 1 images, and end of the last
    names: tuple[str, ...]  # member and shard of each
    parts: tuple[int, ...]  # numbers of consecutive images from one source
    fresh: tuple[bool, ...]  # False for images that replace lost ones: they were read before in this epoch

    @classmethod
    def pack(cls, jpegs: Sequence[Jpeg], num_fresh: int | None = None) -> "JpegBatch":
        """Pack the JPEGs of one source; a worker uses shared memory. num_fresh: fresh ones, at the beginning."""
        offsets = np.cumsum([0, *(len(jpeg.data) for jpeg in jpegs)])
        bytes_N = _allocate(int(offsets[-1]))
        target = bytes_N.numpy()
        for jpeg, (start, stop) in zip(jpegs, pairwise(offsets), strict=True):
            target[start:stop] = np.frombuffer(jpeg.data, dtype=np.uint8)
        num_fresh = len(jpegs) if num_fresh is None else num_fresh
        names, fresh = tuple(jpeg.name for jpeg in jpegs), tuple(place < num_fresh for place in range(len(jpegs)))
        return cls(bytes_N, torch.from_numpy(offsets), names, (len(jpegs),), fresh)

    @classmethod
    def join(cls, several: Sequence["JpegBatch"]) -> "JpegBatch | None":
        """Join the batches of several sources, one after the other; None for none."""
        if len(several) <= 1:
            return several[0] if several else None
        ends = np.cumsum([0, *(len(each.bytes_N) for each in several)])
        offsets = [each.offsets_M[:-1] + int(end) for each, end in zip(several, ends, strict=False)]
        return cls(
            torch.cat([each.bytes_N for each in several], out=_allocate(int(ends[-1]))),
            torch.cat([*offsets, torch.tensor([int(ends[-1])])]),
            tuple(name for each in several for name in each.names),
            tuple(part for each in several for part in each.parts),
            tuple(fresh for each in several for fresh in each.fresh),
        )

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.names)

    def split(self) -> tuple[Tensor, ...]:
        """Return the bytes of each JPEG, as views."""
        return tuple(self.bytes_N[start:stop] for start, stop in pairwise(self.offsets_M.tolist()))

    def pin(self) -> "JpegBatch":
        """Return the same images in pinned memory."""
        return self._replace(bytes_N=self.bytes_N.pin_memory())


def _allocate(num_bytes: int) -> Tensor:
    return private_bytes(num_bytes) if get_worker_info() is None else shared_bytes(num_bytes)
