"""Batches that have lost all their samples are filled from a neighbour, so that every rank keeps its number of them.

Ranks must take equally many steps in a validation too (a forward pass may exchange buffers), and what other ranks have
read of the same step must count. So a lost batch is neither handed out empty nor left out: the batch before it (at the
beginning, after it) is cut, and every sample that can be read still comes exactly once.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

from torch import Tensor

from lightning_moevlm.errors import UserError
from lightning_moevlm.records import Batch
from lightning_moevlm.shards.reader import Delivery


def spread(deliveries: Iterable[Delivery]) -> Iterator[Delivery]:
    """Hand on deliveries, in their order, none of them empty; each batch is of one source.

    Raises:
        UserError: if there are more batches than samples that can be read.

    """
    held: list[Delivery] = []
    for delivery in deliveries:
        if delivery.batch.num_samples and held and _suffices(held):
            yield from _shared(held)
            held = []
        held.append(delivery)
    if not held:
        return
    if not _suffices(held):
        raise UserError(
            f"a rank has to give {len(held)} more batches to evaluate on, but can read "
            f"{sum(one.batch.num_samples for one in held)} more samples: {held[-1].last_words}"
        )
    yield from _shared(held)


def _suffices(held: list[Delivery]) -> bool:
    return sum(delivery.batch.num_samples for delivery in held) >= len(held)


def _shared(held: list[Delivery]) -> Iterator[Delivery]:
    """Cut the batches that are not empty into as many as there are deliveries."""
    full = [delivery.batch for delivery in held if delivery.batch.num_samples]
    num_empty = len(held) - len(full)
    parts: list[Batch] = []
    for batch in full:
        more = min(num_empty, batch.num_samples - 1)
        num_empty -= more
        parts += cut(batch, more + 1)
    for delivery, part in zip(held, parts, strict=True):
        yield delivery._replace(batch=part)


def cut(batch: Batch, num_parts: int) -> list[Batch]:
    """Cut a batch of one source into parts of nearly equal size, as views of its tensors."""
    if num_parts == 1:
        return [batch]
    num = batch.num_samples
    edges = [part * num // num_parts for part in range(num_parts + 1)]
    return [_rows(batch, start, stop) for start, stop in pairwise(edges)]


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    def rows(whole: Tensor | None) -> Tensor | None:
        return None if whole is None else whole[start:stop]

    return batch._replace(
        images_BRYX=rows(batch.images_BRYX),
        text_BL=rows(batch.text_BL),
        text_mask_BL=rows(batch.text_mask_BL),
        keys=batch.keys[start:stop],
        num_pairs=None if batch.num_pairs is None else min(batch.num_pairs, stop - start),
        per_source=tuple(stop - start if count else 0 for count in batch.per_source),
    )
