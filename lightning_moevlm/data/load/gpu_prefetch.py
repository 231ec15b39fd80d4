"""The next batches are on their way to the GPU while the model computes on this one.

Copies (and decoding, augmenting: whatever it takes to prepare a batch) run on a stream of their own; the stream of the
model waits for them by an event, the CPU never does. What is ahead is no part of the loader's place, which moves, and
counts, when a batch is handed out: a resume repeats and skips nothing, whatever the depth.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.data.read.reader import Delivery, Failure


class _Prepared(NamedTuple):
    """A prepared batch. ready: when its stream is done with it; None where there are no streams."""

    item: Delivery | Failure
    ready: torch.cuda.Event | None


def prefetch(
    prepared: Iterator[Delivery | Failure], device: torch.device, num_ahead: int
) -> Iterator[Delivery | Failure]:
    """Hand out batches in their order, while the next `num_ahead` are prepared already.

    prepared: does the work when it is asked for the next one. On a device without streams the work is only done
    earlier, not meanwhile. A failure is handed out when its turn comes, and nothing is asked for beyond it.
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
    with torch.cuda.stream(stream):  # None leaves it as it is
        item = next(prepared, None)
    if item is None:
        return None
    if stream is None:
        return _Prepared(item, None)
    ready = torch.cuda.Event()
    ready.record(stream)
    return _Prepared(item, ready)


def _hand_over(ahead: _Prepared, device: torch.device) -> Delivery | Failure:
    """Let the stream of the model wait for a batch, and keep its memory until that stream is done with it."""
    if ahead.ready is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(ahead.ready)
        for tensor in ahead.item.batch if isinstance(ahead.item, Delivery) else ():
            if isinstance(tensor, Tensor):
                tensor.record_stream(current)
    return ahead.item
