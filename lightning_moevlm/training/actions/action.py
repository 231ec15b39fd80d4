"""The contract of an action: it acts on a model once per optimiser step, after the update and never in `forward`.

A loss pulls, an action moves: it changes weights or routing state directly, from the facts of the step. Facts are
summed over micro-batches and ranks first, so every rank decides alike. An action's state is in the checkpoint, so a
resumed run acts like an uninterrupted one.

A step that `skip_spikes` undid changes no state of an action: biases, weights, counts. QK-clip acts on it all the same,
because it clips the weights that the step was computed with, and those are still in place.
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
"""Kinds of facts; only those that some action needs are collected."""


class StepFacts(NamedTuple):
    """Facts of one optimiser step, over its micro-batches and all ranks; empty or None if no action needs them."""

    step: int
    """Optimiser steps done, this one included."""
    counts: Mapping[str, LayerCounts]
    """The router's choices, by MoE layer."""
    attention: Mapping[str, Tensor]
    """The largest logit per head before any cap, by attention layer, fp32 (H)."""
    loss: Tensor | None
    """Mean total loss, a scalar."""
    skipped: Tensor | None = None
    """Whether the update was undone, a bool scalar on the device; None if skipping is off."""

    @property
    def load(self) -> dict[str, Tensor]:
        """Chosen pairs of each modality at each expert before capacity, by MoE layer, int64 (A, E)."""
        return {path: layer.chosen_AE for path, layer in self.counts.items()}

    def unless_skipped(self, new: Tensor, old: Tensor) -> Tensor:
        """Return the new value, or the old one if the update was undone; the host does not wait for the decision."""
        return new if self.skipped is None else torch.where(self.skipped.to(new.device), old.to(new.device), new)


class Memory(Protocol):
    """State that steps change, beside weights, optimisers and schedules: of actions and gradient stabilisers.

    Checkpoints keep it, and a rollback restores it.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, texts, and containers of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state."""


class Training(NamedTuple):
    """The objects that an action may change."""

    module: nn.Module
    """All that is trained, with the backbone."""
    backbone: Backbone
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler]
    seed: int
    """Of the run; draws follow from it and a name."""
    memories: Mapping[str, Memory] = MappingProxyType({})
    """By name, except the rollback's own."""


class Action(ABC):
    """Acts once per optimiser step; holds its options and its state."""

    needs: frozenset[Fact] = frozenset()

    def before_step(self, training: Training, step: int) -> None:  # noqa: B027 - most actions have nothing to do here
        """Read or change gradients before they are clipped and used; step: number of the coming step, from 1."""

    def prepare(self, step: int) -> None:  # noqa: B027 - most actions have nothing to set
        """Set the model's values for the next step; called before the first step and after each; step: steps done."""

    @abstractmethod
    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Act, and return events by metric key; empty without any."""

    def after_rollback(self) -> dict[str, float]:
        """Act in place of `after_step` where a rollback has restored the model and this action's state."""
        return {}

    def pending(self) -> dict[str, float]:
        """Return the counts on the device since the last call; called on logging steps."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint: tensors, numbers, texts, and containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most actions have none
        """Load the state."""
