"""Sums over the batches and ranks of an evaluation, to be divided at its end.

A mean of means depends on how samples fall into batches; a quotient of sums does not, but for rounding.
"""

from collections import defaultdict
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lightning_moevlm.model.metrics.gather import gather_objects

Name = TypeVar("Name")


class RunningSums(Generic[Name]):
    """Tensors by name, added up in float64. A rank need not know every name."""

    def __init__(self) -> None:
        self._sums: dict[Name, Tensor] = {}

    @torch.no_grad()
    def add(self, name: Name, values: Tensor) -> None:
        """Add a tensor to those of the same name, which have its shape; NaN stays NaN."""
        values = values.to(torch.float64)
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def totals(self) -> dict[Name, Tensor]:
        """Return the sums over all ranks by name, on the CPU; all ranks must call it together."""
        own = {name: values.cpu() for name, values in self._sums.items()}
        found: dict[Name, list[Tensor]] = defaultdict(list)
        for sums in gather_objects(own):
            for name, values in sums.items():
                found[name].append(values)
        return {name: torch.stack(of_ranks).sum(dim=0) for name, of_ranks in found.items()}

    def reset(self) -> None:
        """Set all sums to zero."""
        self._sums = {}
