"""Parts with a fault that an option turns on."""

import torch
from torch import Tensor

from lightning_moevlm.model.experts import MLPExperts
from lightning_moevlm.model.initial_weights import ExpertInit


class FrozenExperts(MLPExperts):
    """Experts of which some get no gradient after a number of backward passes, which is part of the state.

    Args:
        dim: model width D.
        num_experts: E.
        hidden_dim: hidden width F of one expert.
        dropout: share of hidden units left out in training.
        init: initial weights.
        frozen: numbers of the experts; null freezes none.
        since: backward passes before.
    """

    num_passes: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_dim: int = 256,
        dropout: float = 0.0,
        init: ExpertInit = ExpertInit(),
        frozen: list[int] | None = None,
        since: int = 0,
    ) -> None:
        super().__init__(dim, num_experts, hidden_dim, dropout, init)
        self.frozen, self.since = frozen, since
        self.register_buffer("num_passes", torch.zeros((), dtype=torch.int64))
        self.up_EDF.register_hook(self._count_and_stop)
        self.down_EFD.register_hook(self._stop)

    def _count_and_stop(self, gradient: Tensor) -> Tensor:
        self.num_passes += 1
        return self._stop(gradient)

    def _stop(self, gradient: Tensor) -> Tensor:
        if self.frozen is None or int(self.num_passes) <= self.since:
            return gradient
        return gradient.index_fill(0, torch.tensor(self.frozen), 0.0)
