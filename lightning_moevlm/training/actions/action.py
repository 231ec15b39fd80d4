"""The contract of an action: what acts on a model once per optimiser step, after the update and never in `forward`.

A loss pulls, an action moves: it changes weights or routing state directly, from what the step showed. Facts are summed
over the micro-batches and the ranks of the step before any action sees them, so every rank decides alike, and an
action's state is in the checkpoint, so a resumed run acts as the uninterrupted one would have.

A step whose update `skip_spikes` undid leaves no trace in what an action learns from steps: biases, weights, counts.
QK-clip acts on it all the same, for it mends the weights that the step was computed with, and those are still there.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.losses import LayerCounts

Fact = Literal["load", "attention", "loss"]
"""What can be gathered; only what some action needs is."""


class StepFacts(NamedTuple):
    """What one optimiser step showed, over its micro-batches and all ranks; empty or None where no action needs it.

    step: optimiser steps done, this one included. counts: by MoE layer, what its router did.
    attention: by attention layer, the largest logit per head before any cap, fp32 (H). loss: mean total loss, a scalar.
    skipped: whether the update was undone, a bool scalar on the device; None where no update ever is.
    """

    step: int
    counts: Mapping[str, LayerCounts]
    attention: Mapping[str, Tensor]
    loss: Tensor | None
    skipped: Tensor | None = None

    @property
    def load(self) -> dict[str, Tensor]:
        """By MoE layer, chosen pairs of each modality at each expert before capacity, int64 (A, E)."""
        return {path: layer.chosen_AE for path, layer in self.counts.items()}

    def unless_skipped(self, new: Tensor, old: Tensor) -> Tensor:
        """Return the new value, or the old one where the update was undone; nobody waits to know which."""
        return new if self.skipped is None else torch.where(self.skipped.to(new.device), old.to(new.device), new)


class Memory(Protocol):
    """Decides by what it has seen: an action, or the stabilisers of the gradient.

    With the weights, the optimisers and the schedules, memories are all that changes while training: a checkpoint keeps
    them, and a rollback takes them back.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers: tensors, numbers, texts, and containers of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Training(NamedTuple):
    """What an action may act on.

    module: everything that is trained, in which the backbone lies. seed: of the run; draws follow from it and a name.
    memories: by name, all of them but the rollback's own.
    """

    module: nn.Module
    backbone: Backbone
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler]
    seed: int
    memories: Mapping[str, Memory] = MappingProxyType({})


class Action(ABC):
    """Acts once per optimiser step; holds its options and its state."""

    needs: frozenset[Fact] = frozenset()

    def before_step(self, training: Training, step: int) -> None:  # noqa: B027 - most actions have nothing to do here
        """Look at the gradients before they are clipped and used; step: the number of the step to be made, from 1."""

    def prepare(self, step: int) -> None:  # noqa: B027 - most actions have nothing to tell
        """Tell the model what the next step is computed with; step: optimiser steps done. Called before the first step
        and after each, also after one that was taken back."""

    @abstractmethod
    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Act, and return what happened by metric key; empty if nothing did."""

    def pending(self) -> dict[str, float]:
        """Return what has gathered on the device since it was last asked; called on logging steps."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint: tensors, numbers, texts, and containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most actions have none
        """Go on from there."""
