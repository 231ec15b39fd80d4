"""Proof of a gradient stabiliser: on a copy it cuts a spike; in the run its steps are counted.

The trigger is one parameter with a gradient of 1e12. A clip must shorten the step, and skipping must leave it out, with
the run's own thresholds. ZClip and AdaGC first see ordinary norms until their warm-up is over. In the run, a clip's
count is the steps in which it shortened the gradient or update; skipping counts the steps left out.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import SGD

from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt, Switch
from lightning_moevlm.training.optim import GradientControl, GradientEvents, GradientStabilisers

_SPIKE = 1e12


class Activity(NamedTuple):
    """Counts since training started."""

    steps: int
    """Optimiser steps seen."""
    acted: Mapping[str, int]
    """Steps in which each stabiliser acted, by its option."""


class ActivityCounter:
    """Counts on the device; the host waits only when a receipt is due."""

    def __init__(self) -> None:
        self._steps = 0
        self._acted: dict[str, Tensor] = {}

    def add(self, events: GradientEvents) -> None:
        """Add one optimiser step."""
        seen = dict(events.shortened)
        if events.skipped is not None:
            seen["skip_spikes"] = events.skipped
        for name, has_acted in seen.items():
            one = has_acted.to(torch.int64)
            self._acted[name] = self._acted[name] + one if name in self._acted else one
        self._steps += 1

    def read(self) -> Activity:
        """Return the counts since the run started."""
        return Activity(self._steps, {name: int(count) for name, count in self._acted.items()})


def gradient_receipts(trainer: Trainer, module: VisionLanguageModule, activity: Activity) -> list[Receipt]:
    """Return the receipts of the gradient stabilisers, or of Lightning's own clipping."""
    options = module.gradient
    if trainer.gradient_clip_val and not options.any_on:
        return [_lightning_clip(float(trainer.gradient_clip_val))]
    enabled = [entry.name for entry in fields(options) if getattr(options, entry.name) is not None]
    return [_receipt(module, name, activity) for name in enabled]


def _lightning_clip(threshold: float) -> Receipt:
    switch = Switch("trainer.gradient_clip_val", "gradient")
    if threshold > _SPIKE:
        return switch.dead(f"no gradient reaches {threshold:g}", "lower it, or set it to null")
    return switch.is_("idle", "Lightning clips; how often it acts in the run is not counted")


def _receipt(module: VisionLanguageModule, name: str, activity: Activity) -> Receipt:
    switch = Switch(f"gradient.{name}", "gradient")
    left = _apply_to_spike(GradientStabilisers(**{name: getattr(module.gradient, name)}))
    if not left < 1:
        return switch.dead(
            f"a gradient of norm {_SPIKE:g} on a copy passes it unchanged",
            f"lower its threshold, or set model.{switch.name} to null",
        )
    count = activity.acted.get(name, 0)
    verb = "left out" if name == "skip_spikes" else "shortened"
    counted = f"{count} of {activity.steps} steps {verb}" if activity.steps else "no step has been made yet"
    evidence = f"{counted}; on a copy it keeps {left:.2g} of a spike of {_SPIKE:g}"
    return switch.is_("alive" if count else "idle", evidence, float(count))


@cache
def _apply_to_spike(options: GradientStabilisers) -> float:
    """Return the share of a spike that is left of the step; 1 if nothing acts."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = SGD([weight], lr=1.0)
    control = GradientControl(options, optimizer)
    window = max(
        2 * options.z_clip.warmup_steps if options.z_clip else 0,
        2 * options.ada_gc.warmup_steps if options.ada_gc else 0,
        options.skip_spikes.window if options.skip_spikes else 0,
    )
    for step in range(window):
        _step(control, optimizer, weight, 1.0 + 0.1 * (step % 2))
    before = weight.detach().clone()
    _step(control, optimizer, weight, _SPIKE)
    return float((weight.detach() - before).abs().max() / _SPIKE)


def _step(control: GradientControl, optimizer: SGD, weight: nn.Parameter, size: float) -> None:
    weight.grad = torch.tensor([size, 0.0])
    control.before_update(torch.tensor(size))
    optimizer.step()
    control.after_update()
