"""Joins batches of several sources to one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_moevlm.contracts.batch import Answers, Batch


def order_sources(batches: Mapping[int, Batch]) -> list[int]:
    """Return the numbers of the sources in the order of a batch: pairs, images alone, texts alone."""
    return sorted(batches, key=lambda k: _kind(batches[k]))


def join_batches(batches: Mapping[int, Batch], num_sources: int) -> Batch:
    """Join the sources' batches, given by number of the source: pairs, then images alone, then texts alone."""
    per_source = tuple(batches[k].num_samples if k in batches else 0 for k in range(num_sources))
    if not batches:
        return Batch(None, None, None, (), 0, per_source)
    if len(batches) == 1:
        (only,) = batches.values()
        return only._replace(num_pairs=only.pairs, per_source=per_source)
    ordered = [batches[k] for k in order_sources(batches)]
    return Batch(
        _concatenate([batch.images_BRYX for batch in ordered]),
        _concatenate([batch.text_BL for batch in ordered]),
        _concatenate([batch.text_mask_BL for batch in ordered]),
        tuple(key for batch in ordered for key in batch.keys),
        sum(batch.pairs for batch in ordered),
        per_source,
        sum(batch.num_cut for batch in ordered),
        answers=_join_answers(ordered),
        second_images_BRYX=_concatenate([batch.second_images_BRYX for batch in ordered]),
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


def _kind(batch: Batch) -> int:
    return 0 if batch.pairs else 1 if batch.images_BRYX is not None else 2


def _concatenate(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None
