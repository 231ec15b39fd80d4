"""The peer of the data bench: the same shards read with plain WebDataset and Pillow."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moevlm.data.text.tokenizer import CaptionTokenizer


def plain_batches(
    shards: list[Path],
    tokenizer: CaptionTokenizer,
    image_size: int,
    max_text_len: int,
    batch_size: int,
    shuffle_buffer: int,
    num_workers: int,
) -> Iterable[tuple[Tensor, Tensor]]:
    """Return one epoch of (images, texts): decoded to a Pillow image, resized, uint8, stacked by the loader."""
    resized = _Resized(image_size)
    dataset = (
        webdataset.WebDataset(
            [str(path) for path in shards], shardshuffle=len(shards), workersplitter=webdataset.split_by_worker, seed=0
        )
        .shuffle(shuffle_buffer)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(resized, _Tokenised(tokenizer, max_text_len))
        .batched(batch_size, partial=False)
    )
    return DataLoader(dataset, batch_size=None, num_workers=num_workers)


class _Resized:
    def __init__(self, size: int) -> None:
        self._size = (size, size)

    def __call__(self, image: Image.Image) -> Tensor:
        if "exif" in image.info:
            image = ImageOps.exif_transpose(image)
        pixels = np.array(image.resize(self._size, Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class _Tokenised:
    def __init__(self, tokenizer: CaptionTokenizer, max_text_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_text_len = max_text_len

    def __call__(self, caption: str) -> Tensor:
        return self._tokenizer.encode([caption.strip()], self._max_text_len).text_BL[0]
