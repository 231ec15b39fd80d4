"""Prepares the next batches on the GPU while the model computes on the current one.

Copies, decoding and augmentation run on a stream of their own. The model's stream waits for them by an event; the CPU
never waits. The loader's place moves when a batch is handed out, so a resume repeats and skips nothing at any depth.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.data.read.reader import Delivery, Failure


class _Prepared(NamedTuple):
    """A prepared batch."""

    item: Delivery | Failure
    ready: torch.cuda.Event | None  # its stream is done with it; None on devices without streams


def prefetch(
    prepared: Iterator[Delivery | Failure], device: torch.device, num_ahead: int
) -> Iterator[Delivery | Failure]:
    """Hand out batches in their order, with the next `num_ahead` prepared in advance.

    On a device without streams the work is done earlier, but not concurrently. A failure is handed out in its turn, and
    nothing is read after it.

    Args:
        prepared: Prepares a batch in each `next`.
        device: Device of the model.
        num_ahead: Batches to prepare in advance.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" and num_ahead else None
    waiting: deque[_Prepared] = deque()
    more = True
    while more or waiting:
        while more and len(waiting) <= num_ahead:
            ahead = _next(prepared, stream)
            if ahead is not None:
                waiting.append(ahead)
            more = ahead is not None and not isinstance(ahead.item, Failure)
        if waiting:
            yield _hand_over(waiting.popleft(), device)


def _next(prepared: Iterator[Delivery | Failure], stream: torch.cuda.Stream | None) -> _Prepared | None:
    with torch.cuda.stream(stream):  # None changes nothing
        item = next(prepared, None)
    if item is None:
        return None
    if stream is None:
        return _Prepared(item, None)
    ready = torch.cuda.Event()
    ready.record(stream)
    return _Prepared(item, ready)


def _hand_over(ahead: _Prepared, device: torch.device) -> Delivery | Failure:
    """Make the model's stream wait for a batch, and keep its memory until that stream is done with it."""
    if ahead.ready is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(ahead.ready)
        for tensor in ahead.item.batch if isinstance(ahead.item, Delivery) else ():
            if isinstance(tensor, Tensor):
                tensor.record_stream(current)
    return ahead.item
