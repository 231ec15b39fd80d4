"""Changes capacity factors during training: ramps over optimiser steps, and factors that follow the drop rate.

A layer gets the factor of the next step when a step is done, so all micro-batches and the second forward pass of
activation checkpointing use the same one. A ramp follows from the number of steps done and has no state. An adaptive
factor is one number per layer, saved in the checkpoint.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.dispatch import ByDropRate
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.training.actions.action import Action, Fact, StepFacts, Training


class CapacityFactors(Action):
    """Sets the factors of layers.

    Args:
        layers: those with a changing factor, by path.
    """

    def __init__(self, layers: Mapping[str, Mixture]) -> None:
        self._layers = layers
        rules = {path: layer.capacity.train_factor for path, layer in layers.items() if layer.capacity is not None}
        self._ramps = {path: rule for path, rule in rules.items() if isinstance(rule, Ramp)}
        self._rules = {path: rule for path, rule in rules.items() if isinstance(rule, ByDropRate)}
        self._values = {path: torch.tensor(rule.start, dtype=torch.float64) for path, rule in self._rules.items()}
        self.needs = frozenset[Fact]({"load"} if self._rules else ())

    def prepare(self, step: int) -> None:
        """Set every layer's factor after `step` optimiser steps."""
        for path, ramp in self._ramps.items():
            self._layers[path].factor_in_force = torch.tensor(ramp(step), dtype=torch.float64)
        for path, value in self._values.items():
            self._layers[path].factor_in_force = value

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Update adaptive factors by the counts of the step; telemetry logs them with the routing."""
        for path, rule in self._rules.items():
            counts, before = facts.counts[path], self._values[path]
            self._values[path] = facts.unless_skipped(rule.next(before, counts.chosen_AE, counts.kept_AE), before)
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive factors, by layer."""
        return dict(self._values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the factors of layers that are adaptive here too; others start as configured."""
        self._values = {path: state.get(path, value) for path, value in self._values.items()}


def find_changing_layers(backbone: Backbone) -> dict[str, Mixture]:
    """Return the layers whose capacity factor changes during training, by path."""
    return {
        path: module
        for path, module in backbone.named_modules()
        if isinstance(module, Mixture) and module.capacity is not None and module.capacity.changes
    }
