"""Decodes the JPEGs of a batch on the device: a tenth of the transfer, and no decoding in the loader's processes.

On a CUDA device torchcodec decodes a whole batch in one call (extra `gpu-decode`), and images are resized there. The
CPU decodes if there is no such device or no torchcodec. Results differ slightly: nvJPEG does not scale while it
decodes, and resizing is in floating point. torchcodec sets images upright by the same rule as `orientation`.

The device refuses a batch as a whole. Then the CPU decodes it and finds the images that cannot be decoded.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.data.format.faults import MAX_PIXELS
from lightning_moevlm.data.images.decode import decode_image, image_rows, middle_slices
from lightning_moevlm.data.images.jpeg_batch import JpegBatch

DecodeJpegs = Callable[..., list[Tensor]]


class Pixels(NamedTuple):
    """Decoded images."""

    images_BRYX: Tensor  # uint8, RGB; undefined at the places of faults
    faults: Mapping[int, ValueError]  # of images that cannot be decoded, by place in the batch


def decode_batch(images: JpegBatch, size: int, device: torch.device, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode JPEGs to (B, 3, size, size), uint8 RGB, on the device; scaled and cropped as in `decode_image`."""
    decode = _torchcodec() if device.type == "cuda" else None
    if decode is not None:
        try:
            return Pixels(fit_all(decode(list(images.split()), mode="RGB", device=device), size), {})
        except RuntimeError:
            pass  # torchcodec does not name the image; the CPU finds it below
    images_BRYX = image_rows(images.num_images, size)
    faults: dict[int, ValueError] = {}
    for place, (jpeg, row_RYX) in enumerate(zip(images.split(), images_BRYX, strict=True)):
        try:
            decode_image(jpeg.numpy().tobytes(), "jpg", size, max_pixels, into=row_RYX)
        except ValueError as error:
            faults[place] = error
    return Pixels(images_BRYX.to(device, non_blocking=True), faults)


def fit_all(images: Sequence[Tensor], size: int) -> Tensor:
    """Resize images (3, H, W), uint8, until their shorter sides have `size`, and crop them to their middles.

    The ends of a very long image (`middle_slices`) are left out. Images of one shape are resized together: antialiased,
    bilinear, rounded to the nearest.
    """
    seen = [image[:, *middle_slices(image.shape[1], image.shape[2])] for image in images]
    by_shape: dict[tuple[int, int], list[int]] = {}
    for place, image in enumerate(seen):
        by_shape.setdefault((image.shape[1], image.shape[2]), []).append(place)
    fitted_BRYX = images[0].new_empty((len(images), 3, size, size))
    for (height, width), places in by_shape.items():
        scale = size / min(height, width)
        target = (max(size, round(height * scale)), max(size, round(width * scale)))
        stacked = torch.stack([seen[place] for place in places])
        if target != (height, width):
            floats = F.interpolate(stacked.float(), size=target, mode="bilinear", antialias=True)
            stacked = floats.round_().clamp_(0, 255).to(torch.uint8)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        fitted_BRYX[places] = stacked[:, :, top : top + size, left : left + size]
    return fitted_BRYX


@cache
def _torchcodec() -> DecodeJpegs | None:
    """Return torchcodec's decoder; None, with one warning per process, if it is missing or does not load."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:  # the last two: built for another torch or CUDA
        warnings.warn(
            f"JPEGs are decoded on the CPU, because torchcodec cannot be used ({error}); "
            "install it with pip install 'lightning-moevlm[gpu-decode]' beside a CUDA build of torch",
            stacklevel=2,
        )
        return None
    return decode_jpeg
