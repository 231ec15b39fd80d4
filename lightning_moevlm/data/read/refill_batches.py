"""Batches that have lost all their samples are filled from a neighbour, so that every rank keeps its number of them.

Ranks must take equally many steps in a validation too (a forward pass may exchange buffers), and what other ranks have
read of the same step must count. So a lost batch is neither handed out empty nor left out: the batch before it (at the
beginning, after it) is cut, and every sample that can be read still comes exactly once.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.images.jpeg_batch import JpegBatch
from lightning_moevlm.data.read.reader import Delivery, Failure


def spread(arriving: Iterable[Delivery | Failure]) -> Iterator[Delivery | Failure]:
    """Hand on deliveries, in their order, none of them empty; each batch is of one source.

    A `Failure` is handed on, and is the end if there are more batches than samples that can be read.
    """
    held: list[Delivery] = []
    for delivery in arriving:
        if isinstance(delivery, Failure):
            yield delivery
            return
        if delivery.batch.num_samples and held and _suffices(held):
            yield from _shared(held)
            held = []
        held.append(delivery)
    if not held:
        return
    if not _suffices(held):
        yield Failure(
            f"a rank has to give {len(held)} more batches to evaluate on, but can read "
            f"{sum(one.batch.num_samples for one in held)} more samples: {held[-1].last_error}"
        )
        return
    yield from _shared(held)


def _suffices(held: list[Delivery]) -> bool:
    return sum(delivery.batch.num_samples for delivery in held) >= len(held)


def _shared(held: list[Delivery]) -> Iterator[Delivery]:
    """Cut the batches that are not empty into as many as there are deliveries."""
    full = [delivery for delivery in held if delivery.batch.num_samples]
    num_empty = len(held) - len(full)
    parts: list[Part] = []
    for delivery in full:
        more = min(num_empty, delivery.batch.num_samples - 1)
        num_empty -= more
        parts += _cut(delivery, more + 1)
    for delivery, part in zip(held, parts, strict=True):
        yield delivery._replace(batch=part.batch, encoded=part.encoded)


class Part(NamedTuple):
    """Some samples of a delivery."""

    batch: Batch
    encoded: JpegBatch | None


def _cut(delivery: Delivery, num_parts: int) -> list[Part]:
    """Cut a batch of one source into parts of nearly equal size, as views of its tensors."""
    batch, encoded = delivery.batch, delivery.encoded
    if num_parts == 1:
        return [Part(batch, encoded)]
    num = batch.num_samples
    edges = [part * num // num_parts for part in range(num_parts + 1)]
    return [
        Part(_rows(batch, start, stop), None if encoded is None else _pictures(encoded, start, stop))
        for start, stop in pairwise(edges)
    ]


def _pictures(encoded: JpegBatch, start: int, stop: int) -> JpegBatch:
    begin, end = int(encoded.offsets_M[start]), int(encoded.offsets_M[stop])
    return JpegBatch(
        encoded.bytes_N[begin:end],
        encoded.offsets_M[start : stop + 1] - begin,
        encoded.names[start:stop],
        (stop - start,),
        encoded.fresh[start:stop],
    )


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
        num_cut=0 if start else batch.num_cut,  # counted once
    )
