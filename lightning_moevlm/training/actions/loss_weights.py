"""The weight of every auxiliary loss in the current step: constant, scheduled or adaptive.

Schedules follow from the number of optimiser steps done and have no state. An adaptive weight is one number, updated
once per optimiser step by its counts; it is fp32 under every precision and saved in the checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moevlm.contracts.schedules import value_at
from lightning_moevlm.model.losses import AdaptiveWeight, AuxiliaryLosses, LayerCounts
from lightning_moevlm.training.actions.action import Action, StepFacts, Training


class LossWeights(Action):
    """Current weights; an action if one of them adapts.

    Args:
        losses: with their weights.
    """

    needs = frozenset({"load"})

    def __init__(self, losses: AuxiliaryLosses) -> None:
        weights = losses.weights
        self._schedules = {name: weight for name, weight in weights.items() if not isinstance(weight, AdaptiveWeight)}
        self._rules = {name: weight for name, weight in weights.items() if isinstance(weight, AdaptiveWeight)}
        self._values = {name: torch.tensor(rule.start, dtype=torch.float32) for name, rule in self._rules.items()}

    def at(self, step: int) -> dict[str, float | Tensor]:
        """Return the weight of each loss after `step` optimiser steps."""
        return {name: value_at(schedule, step) for name, schedule in self._schedules.items()} | self._values

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Update adaptive weights; telemetry logs them with the losses."""
        before = self._values
        self.update(list(facts.counts.values()))
        self._values = {name: facts.unless_skipped(value, before[name]) for name, value in self._values.items()}
        return {}

    @torch.no_grad()
    def update(self, layers: Sequence[LayerCounts]) -> None:
        """Update adaptive weights by the counts of the last optimiser step; a dense model has none."""
        if layers:
            self._values = {name: rule.next(self._values[name], layers) for name, rule in self._rules.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive weights, by loss."""
        return dict(self._values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the weights of losses that are adaptive here too; others start as configured."""
        self._values = {name: state.get(name, value) for name, value in self._values.items()}
