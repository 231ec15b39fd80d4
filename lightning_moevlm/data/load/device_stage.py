"""Moves batches to the device, and decodes and augments them there: the last stage before the model.

It runs in the training process, between the loader's processes and the loader's own counts. So batches that are
prepared in advance do not count as handed out. The result depends on the batch, the seed, the rank, the epoch and the
batch number alone.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.images.augment import Augment
from lightning_moevlm.data.images.gpu_decode import decode_batch
from lightning_moevlm.data.load.bad_images import insert_pixels
from lightning_moevlm.data.load.gpu_prefetch import prefetch
from lightning_moevlm.data.read.reader import Cursor, Delivery, Failure


@dataclass(frozen=True)
class DeviceStage:
    """Prepares a loader's batches for the model."""

    device: torch.device  # of the model
    image_size: int  # pixels per side, of images that are still encoded
    max_pixels: int  # largest image accepted, of those that are still encoded
    augment: Augment | None  # None augments nothing
    seed: int  # of the augmentation
    rank: int
    num_ahead: int  # batches prepared in advance
    tolerant: bool  # whether samples may be lost
    fills: bool  # whether lost samples are replaced, as in training; otherwise they are left out

    def __call__(self, arriving: Iterator[Delivery | Failure], start: Cursor) -> Iterator[Delivery | Failure]:
        """Prepare the batches that arrive from a cursor on."""
        prepared = (self.prepare(item, start.epoch, number) for number, item in enumerate(arriving, start.batch))
        return prefetch(prepared, self.device, self.num_ahead)

    def prepare(self, item: Delivery | Failure, epoch: int, number: int) -> Delivery | Failure:
        """Return a batch as the model gets it. number: of the batch in its epoch."""
        if isinstance(item, Delivery) and item.jpegs is not None:
            pixels = decode_batch(item.jpegs, self.image_size, self.device, self.max_pixels)
            item = insert_pixels(item, item.jpegs, pixels, self.tolerant, self.fills)
        if isinstance(item, Failure):
            return item
        batch = to_device(item.batch, self.device)
        if self.augment is not None:
            augment = partial(self.augment, seed=self.seed, rank=self.rank, epoch=epoch, batch=number)
            first, second = (
                None if images is None else augment(images) for images in (batch.images_BRYX, batch.second_images_BRYX)
            )  # both images of a sample alike
            batch = batch._replace(images_BRYX=first, second_images_BRYX=second)
        return item._replace(batch=batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch's tensors to the device. Copies from pinned memory do not block the CPU."""
    pinned = device.type == "cuda"
    there: dict[str, Any] = {
        name: (value.pin_memory() if pinned and value.is_cpu else value).to(device, non_blocking=True)
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor)
    }
    return batch._replace(**there)


def warn_without_gpu(device: torch.device, decode: str, prefetch: int | None) -> None:
    """Warn of options that save time on a GPU alone, on another device."""
    in_vain = [f"data.decode {decode}"] * (decode == "device")
    in_vain += [f"data.prefetch {prefetch}"] * (prefetch is not None)
    if in_vain and device.type != "cuda":
        warnings.warn(
            f"{' and '.join(in_vain)}: this saves time on CUDA devices only, and this run is on {device.type}. The "
            "training process does the work, with the same result. Set data.decode cpu and data.prefetch null here",
            stacklevel=4,  # outside cached_property
        )
