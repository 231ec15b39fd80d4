"""The weight of every auxiliary loss in the step at hand: constant, scheduled or adaptive.

Schedules are asked with the number of optimiser steps done and have no state. An adaptive weight is one number that
moves once per optimiser step on the counts of that step; it is in the checkpoint, as fp32, and stays fp32 under
every precision.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moevlm.contracts.schedules import value_at
from lightning_moevlm.model.losses import AdaptiveWeight, AuxiliaryLosses, LayerCounts
from lightning_moevlm.training.actions.action import Action, StepFacts, Training


class LossWeights(Action):
    """Weights in force; an action where one of them adapts.

    Args:
        losses: whose weights they are.
    """

    needs = frozenset({"load"})

    def __init__(self, losses: AuxiliaryLosses) -> None:
        weights = losses.weights
        self._schedules = {name: weight for name, weight in weights.items() if not isinstance(weight, AdaptiveWeight)}
        self._rules = {name: weight for name, weight in weights.items() if isinstance(weight, AdaptiveWeight)}
        self._values = {name: torch.tensor(rule.start, dtype=torch.float32) for name, rule in self._rules.items()}

    def at(self, step: int) -> dict[str, float | Tensor]:
        """Return the weight of each loss when `step` optimiser steps are done."""
        return {name: value_at(schedule, step) for name, schedule in self._schedules.items()} | self._values

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Move the adaptive ones; telemetry logs them with the losses."""
        before = self._values
        self.update(list(facts.counts.values()))
        self._values = {name: facts.unless_skipped(value, before[name]) for name, value in self._values.items()}
        return {}

    @torch.no_grad()
    def update(self, layers: Sequence[LayerCounts]) -> None:
        """Move the adaptive ones on the counts of the optimiser step just done; a dense model counts nothing."""
        if layers:
            self._values = {name: rule.next(self._values[name], layers) for name, rule in self._rules.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive weights, by loss."""
        return dict(self._values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the weights of losses that are adaptive here too; the others start as configured."""
        self._values = {name: state.get(name, value) for name, value in self._values.items()}
