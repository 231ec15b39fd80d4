"""The last stage before the model, in the training process: a batch goes to the device, is decoded and augmented there.

It runs between the loader's processes and the loader's own count of what it has handed out, so that whatever is
prepared ahead is no part of its place. What it makes of a batch follows from the batch, the seed, the rank, the epoch
and the batch's number alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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
    """Prepares a loader's batches for the model.

    device: where the model is. image_size, max_pixels: of images that are still encoded. augment: null augments
    nothing. seed, rank: what draws depend on, besides the batch. num_ahead: batches prepared ahead. tolerant: whether
    samples may be lost. fills: whether lost ones are replaced, as in training, or left out.
    """

    device: torch.device
    image_size: int
    max_pixels: int
    augment: Augment | None
    seed: int
    rank: int
    num_ahead: int
    tolerant: bool
    fills: bool

    def __call__(self, arriving: Iterator[Delivery | Failure], start: Cursor) -> Iterator[Delivery | Failure]:
        """Prepare what arrives from a place on."""
        prepared = (self.prepare(item, start.epoch, number) for number, item in enumerate(arriving, start.batch))
        return prefetch(prepared, self.device, self.num_ahead)

    def prepare(self, item: Delivery | Failure, epoch: int, number: int) -> Delivery | Failure:
        """Return a batch as the model gets it. number: in its epoch."""
        if isinstance(item, Delivery) and item.jpegs is not None:
            pixels = decode_batch(item.jpegs, self.image_size, self.device, self.max_pixels)
            item = insert_pixels(item, item.jpegs, pixels, self.tolerant, self.fills)
        if isinstance(item, Failure):
            return item
        batch = to_device(item.batch, self.device)
        if self.augment is not None and batch.images_BRYX is not None:
            images_BRYX = self.augment(batch.images_BRYX, self.seed, self.rank, epoch, number)
            batch = batch._replace(images_BRYX=images_BRYX)
        return item._replace(batch=batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on the device; from pinned memory a copy does not hold up the CPU."""
    pinned = device.type == "cuda"
    there: dict[str, Any] = {
        name: (value.pin_memory() if pinned and value.is_cpu else value).to(device, non_blocking=True)
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor)
    }
    return batch._replace(**there)
