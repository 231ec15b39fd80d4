"""JPEG bytes travel, pixels are made on the device: a tenth of the transfer, and no decoding on the CPU.

On a CUDA device torchcodec decodes a whole batch in one call (extra `gpu-decode`), and the pictures are resized there.
Where there is no such device, or torchcodec is missing or does not load, the CPU decodes as it always does. The two
differ by what decoders differ in: nvJPEG does not scale while it decodes, and resizing there is in floating point.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.shards.decode import decode_image, image_rows
from lightning_moevlm.shards.faults import MAX_PIXELS

DecodeJpegs = Callable[..., list[Tensor]]


class EncodedImages(NamedTuple):
    """The JPEGs of a batch in one tensor. bytes_N: uint8, one after another. lengths: bytes of each."""

    bytes_N: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, jpegs: Sequence[bytes]) -> "EncodedImages":
        """Put JPEGs together."""
        return cls(torch.frombuffer(bytearray(b"".join(jpegs)), dtype=torch.uint8), tuple(len(jpeg) for jpeg in jpegs))

    def each(self) -> tuple[Tensor, ...]:
        """Return the bytes of every JPEG."""
        return self.bytes_N.split(self.lengths)


def decode_on(images: EncodedImages, size: int, device: torch.device, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode JPEGs to (B, 3, size, size), uint8 RGB, on the device; scaled and cut as `decode_image` does it.

    Raises:
        ValueError: if one of them is no JPEG, or has more than `max_pixels`.

    """
    decode = _torchcodec() if device.type == "cuda" else None
    if decode is None:
        rows_BRYX = image_rows(len(images.lengths), size)
        for jpeg, row_RYX in zip(images.each(), rows_BRYX, strict=True):
            decode_image(jpeg.numpy().tobytes(), "jpg", size, max_pixels, into=row_RYX)
        return rows_BRYX.to(device, non_blocking=True)
    try:
        return fit_all(decode(list(images.each()), mode="RGB", device=device), size)
    except RuntimeError as error:
        raise ValueError(f"a JPEG cannot be decoded on {device} ({error})") from error


def fit_all(pictures: Sequence[Tensor], size: int) -> Tensor:
    """Resize pictures (3, H, W), uint8, so that their shorter sides have `size`, and cut out their middles.

    Those of one shape are resized together. Antialiased, bilinear, rounded to the nearest.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for place, picture in enumerate(pictures):
        by_shape.setdefault((picture.shape[1], picture.shape[2]), []).append(place)
    fitted_BRYX = pictures[0].new_empty((len(pictures), 3, size, size))
    for (height, width), places in by_shape.items():
        scale = size / min(height, width)
        target = (max(size, round(height * scale)), max(size, round(width * scale)))
        stacked = torch.stack([pictures[place] for place in places])
        if target != (height, width):
            floats = F.interpolate(stacked.float(), size=target, mode="bilinear", antialias=True)
            stacked = floats.round_().clamp_(0, 255).to(torch.uint8)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        fitted_BRYX[places] = stacked[:, :, top : top + size, left : left + size]
    return fitted_BRYX


@cache
def _torchcodec() -> DecodeJpegs | None:
    """Return torchcodec's decoder; None, with one warning per process, where it is missing or does not load."""
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
