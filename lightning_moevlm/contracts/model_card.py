"""The size and cost of a model, as studies compare them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

PARTS = ("embeddings", "attention", "router", "experts", "feed_forward", "heads")
"""What active FLOPs are counted of; `experts` are those that run, shared ones included."""


class ModelCard(NamedTuple):
    """Costs of a backbone.

    total_parameters: all parameters.
    active_parameters: parameters without the experts that a token does not visit.
    active_flops_per_sample: matrix FLOPs of one forward pass over one image-text pair of full length. A multiply and an
        add count as two. A test compares them with torch's FlopCounterMode, within 1 %.
    """

    total_parameters: int
    active_parameters: int
    active_flops_per_sample: int


@dataclass(frozen=True)
class Costs:
    """Costs of forward passes; those of parts and of passes add up.

    The first six are active matrix FLOPs, where a multiply and an add count as two. The last two are the numbers that
    the backward pass needs; with mixed precision the first kind is kept in fp32, the second in the low precision.
    """

    embeddings: float = 0.0
    attention: float = 0.0
    router: float = 0.0
    experts: float = 0.0
    feed_forward: float = 0.0
    heads: float = 0.0
    kept_by_norms: float = 0.0  # inputs of norms, router scores, log-probabilities
    kept_by_products: float = 0.0  # inputs of matrix products and of activation functions

    @property
    def flops(self) -> float:
        """Active matrix FLOPs of all parts."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, float]:
        """Return the active matrix FLOPs of each part."""
        return {part: getattr(self, part) for part in PARTS}

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> "Costs":
        return Costs(*(times * value for value in vars(self).values()))


def add_costs(costs: Iterable[Costs]) -> Costs:
    """Return the sum; without any, zeros."""
    return reduce(Costs.__add__, costs, Costs())
