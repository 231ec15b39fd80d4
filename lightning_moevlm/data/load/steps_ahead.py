"""Looks ahead over the batches of an optimiser step, so that each of them knows how much the others hold.

Held batches keep their memory: as many as make a step are read before the first of them is handed out.
"""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from lightning_moevlm.contracts.batch import Batch, WholeStep
from lightning_moevlm.data.read.reader import Delivery, Failure

Item = TypeVar("Item")


def look_ahead(arriving: Iterator[Delivery | Failure], first: int, per_step: int) -> Iterator[Delivery | Failure]:
    """Hand on deliveries in their order, each batch with those of its step.

    A step of which a part is done already knows the rest alone.

    Args:
        arriving: what a loader reads.
        first: number of the first batch in its epoch, which is of whole steps.
        per_step: batches that make an optimiser step.
    """
    for held in _steps(arriving, first, per_step):
        batches = [item.batch for item in held if isinstance(item, Delivery)]
        step = WholeStep(tuple(batch.without_pixels() for batch in batches))
        for item in held:
            yield item._replace(batch=item.batch._replace(step=step)) if isinstance(item, Delivery) else item


class StepsAhead:
    """A loader of one's own, of which each batch knows those of its step.

    Args:
        loader: of whole steps.
        per_step: batches that make an optimiser step: `accumulate_grad_batches`.
    """

    def __init__(self, loader: Iterable[Batch], per_step: int) -> None:
        self._loader = loader
        self._per_step = per_step

    def __len__(self) -> int:
        """Batches of an epoch."""
        assert isinstance(self._loader, Sized)
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Hand the loader's batches on."""
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
