"""Looks ahead over the batches of an optimiser step, so that each of them knows the sizes of the others.

All batches of a step are read before the first is handed out, and keep their memory until then.
"""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from lightning_moevlm.contracts.batch import Batch, WholeStep
from lightning_moevlm.data.read.reader import Delivery, Failure

Item = TypeVar("Item")


def look_ahead(arriving: Iterator[Delivery | Failure], first: int, per_step: int) -> Iterator[Delivery | Failure]:
    """Yield deliveries in their order, each batch with those of its step.

    If a step is resumed in its middle, its batches know only the rest of it.

    Args:
        arriving: Deliveries of a loader.
        first: Number of the first batch in its epoch, which consists of whole steps.
        per_step: Batches per optimiser step.
    """
    for held in _steps(arriving, first, per_step):
        batches = [item.batch for item in held if isinstance(item, Delivery)]
        step = WholeStep(tuple(batch.without_pixels() for batch in batches))
        for item in held:
            yield item._replace(batch=item.batch._replace(step=step)) if isinstance(item, Delivery) else item


class StepsAhead:
    """Wraps any loader, so that each batch knows those of its step.

    Args:
        loader: Yields whole steps.
        per_step: Batches per optimiser step: `accumulate_grad_batches`.
    """

    def __init__(self, loader: Iterable[Batch], per_step: int) -> None:
        self._loader = loader
        self._per_step = per_step

    def __len__(self) -> int:
        """Return the batches of an epoch."""
        assert isinstance(self._loader, Sized)
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the loader's batches."""
        for held in _steps(iter(self._loader), 0, self._per_step):
            step = WholeStep(tuple(batch.without_pixels() for batch in held))
            yield from (batch._replace(step=step) for batch in held)


def _steps(arriving: Iterator[Item], first: int, per_step: int) -> Iterator[list[Item]]:
    held: list[Item] = []
    for number, item in enumerate(arriving, first + 1):
        held.append(item)
        if number % per_step == 0 or isinstance(item, Failure):
            yield held
            held = []
    if held:
        yield held
