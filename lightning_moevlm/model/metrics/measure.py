"""The contract of what is measured in an evaluation: one idea, over the batches of all ranks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from lightning_moevlm.contracts.step_records import ObjectiveOutput, Term


class Measured(NamedTuple):
    """The result of an epoch.

    values: metrics by key.
    terms: terms of the task over the whole set; they replace the means of the batches of that name.
    """

    values: Mapping[str, float] = MappingProxyType({})
    terms: Mapping[str, Term] = MappingProxyType({})


class Measure(ABC):
    """Sums up outputs of an objective, so that neither the batch size nor the ranks matter.

    alone: set where an evaluation can hold one of the kind only, as its keys name no term: what it computes.
    """

    alone: ClassVar[str | None] = None

    @abstractmethod
    def update(self, output: ObjectiveOutput) -> None:
        """Add one batch."""

    @abstractmethod
    def compute(self, stage: str) -> Measured:
        """Return the epoch of all ranks, which must ask together; stage: the prefix of its keys."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all batches."""
