"""Spoils the training batches of some steps on purpose: a known fault, so that stabilisers and forensics can be tested.

    noise_images     every image is uniform noise
    repeated         every sample is a copy of the batch's first
    shuffled_texts   each image gets the text of the next sample of the batch

Real streams have all three: broken images, documents that repeat (OLMo 2, arXiv 2501.00656, drops those with many
repeated n-grams) and captions of other images. Keys stay those of the samples that were read.
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Batch

Fault = Literal["noise_images", "repeated", "shuffled_texts"]


@dataclass(frozen=True)
class BadBatches:
    """A burst of bad training batches; evaluation has none.

    Args:
        fault: `noise_images`, `repeated` (every sample is the first one) or `shuffled_texts` (each image with the text
            of another sample).
        begin: Optimiser steps before the burst.
        num_steps: Length of the burst in optimiser steps.
    """

    fault: Fault
    begin: int
    num_steps: int = 1

    def __post_init__(self) -> None:
        for name, count, least in (("begin", self.begin, 0), ("num_steps", self.num_steps, 1)):
            check_number(f"data.bad_batches.{name}", count, least=least, advice=" optimiser steps")

    def check(self, decodes_on_device: bool, has_urls: bool) -> None:
        """Refuse ways of reading in which batches cannot be spoiled.

        Raises:
            UserError: with what to change.
        """
        if decodes_on_device:
            raise UserError("data.bad_batches spoils decoded images, and data.decode is device: set data.decode cpu")
        if has_urls:
            raise UserError(
                "data.bad_batches spoils batches of sets, and data.urls names tars: name a set by data.root or "
                "data.sources (`moevlm data index` makes one of tars)"
            )

    def spoil(self, batch: Batch, step: int, seed: int) -> Batch:
        """Return the batch of a step, spoiled if the step lies in the burst. It is overwritten in place.

        Args:
            batch: of one rank and micro-batch.
            step: optimiser steps before it.
            seed: of the noise; equal seeds, steps and keys give equal noise.

        Raises:
            UserError: noise for a batch without images, or shuffled texts of one without pairs.
        """
        if not self.begin <= step < self.begin + self.num_steps:
            return batch
        match self.fault:
            case "noise_images":
                return _add_noise(batch, f"{seed}/{step}/{batch.keys}")
            case "repeated":
                return _repeat_first(batch)
            case "shuffled_texts":
                return _shift_texts(batch)


def _add_noise(batch: Batch, seed: str) -> Batch:
    images_BRYX = batch.images_BRYX
    if images_BRYX is None:
        raise UserError(
            "data.bad_batches.fault is noise_images, and the batch has no images: choose repeated, or read a set with "
            "images"
        )
    generator = torch.Generator().manual_seed(Random(seed).getrandbits(63))
    images_BRYX.copy_(torch.randint(0, 256, images_BRYX.shape, dtype=torch.uint8, generator=generator))
    return batch


def _repeat_first(batch: Batch) -> Batch:
    for values in (batch.images_BRYX, batch.text_BL, batch.text_mask_BL, batch.second_images_BRYX):
        if values is not None:
            values.copy_(values[:1].clone().expand_as(values))
    if batch.answers is None:
        return batch
    return batch._replace(answers=batch.answers.select([0] * len(batch.answers.given)))


def _shift_texts(batch: Batch) -> Batch:
    text_BL, mask_BL, pairs = batch.text_BL, batch.text_mask_BL, batch.pairs
    if text_BL is None or mask_BL is None or not pairs:
        raise UserError(
            "data.bad_batches.fault is shuffled_texts, and the batch has no pairs: choose repeated, or read a set of "
            "pairs"
        )
    for values in (text_BL, mask_BL):
        values[:pairs] = values[:pairs].roll(-1, dims=0)
    return batch
