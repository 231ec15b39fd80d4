"""Capacity factors that change while training: ramps over optimiser steps, and those that follow the drop rate.

A layer is told the factor of the next step once a step is done and computes with it until the next one is, so that
micro-batches, and the second forward pass of activation checkpointing, see one factor. A ramp is asked with the number
of steps done and has no state. An adaptive factor is one number per layer; it is in the checkpoint.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.dispatch import ByDropRate
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.training.actions.action import Action, Fact, StepFacts, Training


class CapacityFactors(Action):
    """Moves the factors of layers and tells the layers.

    Args:
        layers: by path, those whose factor changes.
    """

    def __init__(self, layers: Mapping[str, MoEFFN]) -> None:
        self._layers = layers
        rules = {path: layer.capacity.train_factor for path, layer in layers.items() if layer.capacity is not None}
        self._ramps = {path: rule for path, rule in rules.items() if isinstance(rule, Ramp)}
        self._rules = {path: rule for path, rule in rules.items() if isinstance(rule, ByDropRate)}
        self._values = {path: torch.tensor(rule.start, dtype=torch.float64) for path, rule in self._rules.items()}
        self.needs = frozenset[Fact]({"load"} if self._rules else ())

    def prepare(self, step: int) -> None:
        """Tell every layer the factor that holds when `step` optimiser steps are done."""
        for path, ramp in self._ramps.items():
            self._layers[path].factor_in_force = torch.tensor(ramp(step), dtype=torch.float64)
        for path, value in self._values.items():
            self._layers[path].factor_in_force = value

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Move the adaptive ones on the counts of the step; telemetry logs the factors with the routing."""
        for path, rule in self._rules.items():
            counts, before = facts.counts[path], self._values[path]
            self._values[path] = facts.unless_skipped(rule.next(before, counts.chosen_AE, counts.kept_AE), before)
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive factors, by layer."""
        return dict(self._values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the factors of layers that are adaptive here too; the others start as configured."""
        self._values = {path: state.get(path, value) for path, value in self._values.items()}


def find_changing_layers(backbone: Backbone) -> dict[str, MoEFFN]:
    """Return the layers whose capacity factor changes while training, by path."""
    return {
        path: module
        for path, module in backbone.named_modules()
        if isinstance(module, MoEFFN) and module.capacity is not None and module.capacity.changes
    }
