"""From raw samples to one `Batch`: decode, tokenise, stack."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moevlm.errors import UserError
from lightning_moevlm.records import Batch
from lightning_moevlm.shards.decode import (
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    decode_caption,
    decode_image,
    undecodable,
)
from lightning_moevlm.shards.source import RawSample
from lightning_moevlm.shards.tokenizer import CaptionTokenizer


class Collate:
    """Makes a batch of raw samples.

    image_size: pixels per side. max_text_len: ids per text, [BOS] and [EOS] included.
    """

    def __init__(self, members: Sequence[str], tokenizer: CaptionTokenizer, image_size: int, max_text_len: int) -> None:
        self._image_extension = next((e for e in IMAGE_EXTENSIONS if e in members), None)
        self._has_captions = CAPTION_EXTENSION in members
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._max_text_len = max_text_len

    @property
    def wanted(self) -> frozenset[str]:
        """The file extensions that are read at all."""
        captions = (CAPTION_EXTENSION,) if self._has_captions else ()
        return frozenset(captions if self._image_extension is None else (self._image_extension, *captions))

    def __call__(self, samples: Sequence[RawSample]) -> Batch:
        """Decode and stack; the modality that the set lacks is None.

        Raises:
            UserError: if a sample lacks a member or cannot be decoded.

        """
        images_BRYX = None
        if self._image_extension is not None:
            images_BRYX = torch.stack([self._image(sample, self._image_extension) for sample in samples])
        text_BL, text_mask_BL = None, None
        if self._has_captions:
            captions = [self._caption(sample) for sample in samples]
            text_BL, text_mask_BL = self._tokenizer.encode(captions, self._max_text_len)
        return Batch(images_BRYX, text_BL, text_mask_BL, tuple(sample.key for sample in samples))

    def _image(self, sample: RawSample, extension: str) -> Tensor:
        data = _member(sample, extension)
        try:
            return decode_image(data, extension, self._image_size)
        except ValueError as error:
            raise undecodable(sample.key, sample.shard, extension, error) from error

    def _caption(self, sample: RawSample) -> str:
        data = _member(sample, CAPTION_EXTENSION)
        try:
            return decode_caption(data)
        except ValueError as error:
            raise undecodable(sample.key, sample.shard, CAPTION_EXTENSION, error) from error


def _member(sample: RawSample, extension: str) -> bytes:
    if extension not in sample.members:
        raise UserError(f"{sample.key} in shard {sample.shard} has no .{extension} member; rebuild the set")
    return sample.members[extension]
