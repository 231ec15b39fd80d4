"""Collects the facts of an optimiser step: over its micro-batches one by one, over ranks at its end.

Every layer has its place from the start, so ranks exchange the same numbers even if one of them had no text.
"""

from collections.abc import Callable, Iterable
from typing import TypedDict

import torch
from torch import Tensor

from lightning_moevlm.contracts.step_records import AttentionLogits
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import Attention
from lightning_moevlm.model.losses import LayerCounts
from lightning_moevlm.training.actions.action import Fact, StepFacts
from lightning_moevlm.training.step.routing_counts import RoutingCounter

Reduce = Callable[[Tensor, str], Tensor]
"""(tensor, "sum" or "mean" or "max") -> the same over ranks."""


class CollectedFacts(TypedDict):
    """Facts of a partial step."""

    attention: dict[str, Tensor]
    """Largest logits by layer (H)."""
    losses: Tensor
    """Total loss of each micro-batch, by rank (ranks, n)."""


class FactCollector:
    """Counts of routing, largest attention logits and loss since the last step.

    Args:
        backbone: holds the layers.
        needs: facts to collect.
        counter: counts the routers' choices; shared with the training step, in which losses may read it.
    """

    def __init__(self, backbone: Backbone, needs: frozenset[Fact], counter: RoutingCounter) -> None:
        layers = dict(backbone.named_modules())
        self._needs = needs
        self._counter = counter
        self._num_heads = {path: layer.num_heads for path, layer in layers.items() if isinstance(layer, Attention)}
        self._attention: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []

    def add(self, attention: Iterable[AttentionLogits], loss: Tensor) -> None:
        """Add one micro-batch."""
        if "attention" in self._needs:
            for logits in attention:
                before = self._attention.get(logits.layer)
                self._attention[logits.layer] = logits.max_H if before is None else before.maximum(logits.max_H)
        if "loss" in self._needs:
            self._losses.append(loss)

    def finish(self, step: int, device: torch.device, reduce: Reduce) -> StepFacts:
        """Return the facts of the step over all ranks, and reset."""
        counts: dict[str, LayerCounts] = {}
        attention: dict[str, Tensor] = {}
        loss = None
        if "load" in self._needs:
            counts = self._counter.totals(lambda flat: reduce(flat, "sum"), device)
        if "attention" in self._needs:
            assert self._attention, "QK-clip acts on attention logits, and the objective returned none"
            attention = self._largest(device, reduce)
        if "loss" in self._needs:
            loss = reduce(torch.stack(self._losses).float().mean(), "mean")
        self._attention, self._losses = {}, []
        return StepFacts(step, counts, attention, loss)

    def state(self, device: torch.device, reduce: Reduce, gather_ranks: Callable[[Tensor], Tensor]) -> CollectedFacts:
        """Return the facts so far over all ranks; all ranks must call it together. gather_ranks: (n) -> (ranks, n)."""
        attention = self._largest(device, reduce) if "attention" in self._needs else {}
        losses = torch.stack(self._losses) if self._losses else torch.zeros(0, device=device)
        return CollectedFacts(attention=attention, losses=gather_ranks(losses))

    def restore(self, state: CollectedFacts, device: torch.device, select_rank: Callable[[Tensor], Tensor]) -> None:
        """Continue from there; select_rank: (ranks, n) -> (n)."""
        self._attention = {path: max_H.to(device) for path, max_H in state["attention"].items()}
        self._losses = list(select_rank(state["losses"]).to(device))

    def _largest(self, device: torch.device, reduce: Reduce) -> dict[str, Tensor]:
        none = {path: torch.full((count,), -torch.inf, device=device) for path, count in self._num_heads.items()}
        return _reduce_joined(none | self._attention, lambda flat: reduce(flat, "max"))


def _reduce_joined(values: dict[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Reduce all tensors in one exchange."""
    flat = reduce(torch.cat([value.flatten() for value in values.values()]))
    pieces = flat.split([value.numel() for value in values.values()])
    return {path: piece.view_as(value) for (path, value), piece in zip(values.items(), pieces, strict=True)}
