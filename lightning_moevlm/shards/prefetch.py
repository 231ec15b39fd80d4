"""The next batch is on its way to the GPU while the model computes on this one.

Copies (and decoding, augmenting: whatever `prepare` does) run on a stream of their own; the stream of the model waits
for them by an event, the CPU never does. Length and state are those of the loader underneath as of the batch that was
handed out last: what is prefetched beyond it is no part of the state, so a resume repeats and skips nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_moevlm.records import Batch

Prepare = Callable[[Any, torch.device], Batch]


class StatefulLoader(Protocol):
    """A loader that knows its length and its place."""

    def __iter__(self) -> Iterator[Any]:
        """Hand out the rest of an epoch."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def state_dict(self) -> Any:
        """Return the place; nothing that was returned changes later."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a place."""


class DevicePrefetcher:
    """Hands out a loader's batches on a device, each prepared one batch ahead.

    prepare: makes of a batch what the model gets, by default the same with its tensors on the device. On a device
    without streams it runs when the batch is handed out, which changes nothing but the time.
    """

    def __init__(self, loader: StatefulLoader, device: torch.device, prepare: Prepare | None = None) -> None:
        self._loader = loader
        self._device = device
        self._prepare: Prepare = prepare or moved
        self._state: Any = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._loader)

    def state_dict(self) -> Any:
        """Return the loader's place after the batch that was handed out last."""
        return self._loader.state_dict() if self._state is None else self._state

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a place."""
        self._state = None
        self._loader.load_state_dict(state_dict)

    def __iter__(self) -> Iterator[Batch]:
        """Hand out the rest of an epoch, one batch ahead."""
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        ahead = self._ahead(stream)
        following = next(ahead, None)
        while following is not None:
            (batch, state, ready), following = following, None
            if ready is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(ready)
                for tensor in batch:
                    if isinstance(tensor, Tensor):
                        tensor.record_stream(current)  # or its memory might be given away while the model reads it
            following = next(ahead, None)
            self._state = state
            yield batch
        self._state = None  # the loader's own state is right again, also if it counts the end of an epoch

    def _ahead(self, stream: torch.cuda.Stream | None) -> Iterator[tuple[Batch, Any, torch.cuda.Event | None]]:
        for batch in self._loader:
            state = self._loader.state_dict()
            if stream is None:
                yield self._prepare(batch, self._device), state, None
                continue
            with torch.cuda.stream(stream):
                prepared = self._prepare(batch, self._device)
                ready = torch.cuda.Event()
                ready.record(stream)
            yield prepared, state, ready


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on the device; from pinned memory a copy does not hold up the CPU."""
    pinned = device.type == "cuda"
    there: dict[str, Any] = {
        name: (value.pin_memory() if pinned else value).to(device, non_blocking=True)
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor)
    }
    return batch._replace(**there)
