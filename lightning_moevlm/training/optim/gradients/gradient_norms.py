"""Computes the norm of each gradient of an optimiser step once, before clipping, for all that read it.

Clipping, telemetry and the flight recorder read the same numbers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter


class GradientNorms:
    """Norms of the last optimiser step that was measured.

    Clipping by norm measures every step. Without it, a step is measured if a callback has asked for it.

    Attributes:
        params: the parameters that had a gradient.
        norm_P: the norm of each of their gradients, in the dtype of the gradients (P,).
        total: the norm of all of them, scalar; None before the first measurement.
    """

    def __init__(self) -> None:
        self.params: tuple[Parameter, ...] = ()
        self.norm_P = torch.zeros(0)
        self.total: Tensor | None = None
        self._is_wanted = False

    def ask(self) -> None:
        """Have the coming update measured; call it in `on_before_optimizer_step`."""
        self._is_wanted = True

    def measure_if_asked(self, params: Iterable[Parameter]) -> None:
        """Measure the gradients if somebody has asked for it."""
        if self._is_wanted:
            self.measure(params)

    @torch.no_grad()
    def measure(self, params: Iterable[Parameter]) -> Tensor:
        """Return the norm of all gradients, a scalar; 0 if there is none."""
        self._is_wanted = False
        self.params = tuple(p for p in params if p.grad is not None)
        gradients = [p.grad for p in self.params if p.grad is not None]
        norms = torch._foreach_norm(gradients) if gradients else (torch.zeros(()),)
        self.norm_P = torch.stack(norms)[: len(self.params)]
        self.total = torch.linalg.vector_norm(torch.stack(norms))
        return self.total
