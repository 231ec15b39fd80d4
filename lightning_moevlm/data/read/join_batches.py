"""Joins batches of several sources to one."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lightning_moevlm.contracts.batch import Answers, Batch, FurtherCaptions


def order_sources(batches: Mapping[int, Batch]) -> list[int]:
    """Return the numbers of the sources in the order of a batch: pairs, images alone, texts alone."""
    return sorted(batches, key=lambda k: _kind(batches[k]))


def join_batches(batches: Mapping[int, Batch], names: Sequence[str]) -> Batch:
    """Join the sources' batches, given by number of the source: pairs, then images alone, then texts alone.

    names: names of all sources.
    """
    num_cut = tuple(sum(batches[k].num_cut) if k in batches else 0 for k in range(len(names)))
    if not batches:
        return Batch(None, None, None, (), 0, num_cut=num_cut)
    sources = tuple(name for k in order_sources(batches) for name in (names[k],) * batches[k].num_samples)
    if len(batches) == 1:
        (only,) = batches.values()
        return only._replace(num_pairs=only.pairs, sources=sources, num_cut=num_cut)
    ordered = [batches[k] for k in order_sources(batches)]
    return Batch(
        _concatenate([batch.images_BRYX for batch in ordered]),
        _concatenate([batch.text_BL for batch in ordered]),
        _concatenate([batch.text_mask_BL for batch in ordered]),
        tuple(key for batch in ordered for key in batch.keys),
        sum(batch.pairs for batch in ordered),
        sources,
        num_cut,
        answers=_join_answers(ordered),
        second_images_BRYX=_join_second_images(ordered),
        further_captions=_join_further(ordered),
        chats=tuple(chat for batch in ordered for chat in batch.chats or ()) or None,
    )


def _join_answers(batches: Sequence[Batch]) -> Answers | None:
    """Join the answers of all samples; samples of a source without answers have empty ones."""
    if all(batch.answers is None for batch in batches):
        return None
    each = [batch.answers or Answers(((),) * batch.num_samples, ("",) * batch.num_samples) for batch in batches]
    return Answers(
        tuple(given for answers in each for given in answers.given),
        tuple(kind for answers in each for kind in answers.kinds),
    )


def _join_second_images(batches: Sequence[Batch]) -> Tensor | None:
    """Join the second images of all samples with images; those of a source without second images are black."""
    if all(batch.second_images_BRYX is None for batch in batches):
        return None
    with_images = [batch for batch in batches if batch.images_BRYX is not None]
    return _concatenate(
        [
            torch.zeros_like(batch.images_BRYX)
            if batch.second_images_BRYX is None and batch.images_BRYX is not None
            else batch.second_images_BRYX
            for batch in with_images
        ]
    )


def _join_further(batches: Sequence[Batch]) -> FurtherCaptions | None:
    """Join the further captions, which those of pairs alone have; pairs come first."""
    starts = accumulate((batch.num_samples for batch in batches), initial=0)
    there = [(start, each) for start, batch in zip(starts, batches, strict=False) if (each := batch.further_captions)]
    if not there:
        return None
    return FurtherCaptions(
        torch.cat([each.text_ML for _, each in there]),
        torch.cat([each.text_mask_ML for _, each in there]),
        tuple(start + pair for start, each in there for pair in each.pairs),
    )


def _kind(batch: Batch) -> int:
    return 0 if batch.pairs else 1 if batch.images_BRYX is not None else 2


def _concatenate(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None
