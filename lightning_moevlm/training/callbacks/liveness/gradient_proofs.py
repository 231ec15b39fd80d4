"""Proof of a stabiliser of the gradient: a spike, on a copy, is cut by it; and how often it has acted in this run.

The trigger is one parameter with a gradient of 1e12, which an optimiser of the copy would follow. A clip must shorten
the step, and skipping must leave it out, with the run's own thresholds; ZClip and AdaGC are given ordinary norms until
they know what is ordinary. In the run itself one counts the steps in which each clip made the gradient, or the update,
shorter than it came to it, and those that were left out.
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
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt, Verdict
from lightning_moevlm.training.optim import GradientControl, GradientEvents, GradientStabilisers

_SPIKE = 1e12


class Activity(NamedTuple):
    """Optimiser steps seen on the way here, and in how many of them each stabiliser, by its option, has acted."""

    steps: int
    acted: Mapping[str, int]


class ActivityCounter:
    """Counts on the device, so that nobody waits before a receipt is asked for."""

    def __init__(self) -> None:
        self._steps = 0
        self._acted: dict[str, Tensor] = {}

    def add(self, events: GradientEvents) -> None:
        """Take in one optimiser step."""
        seen = dict(events.shortened)
        if events.skipped is not None:
            seen["skip_spikes"] = events.skipped
        for name, has_acted in seen.items():
            one = has_acted.to(torch.int64)
            self._acted[name] = self._acted[name] + one if name in self._acted else one
        self._steps += 1

    def read(self) -> Activity:
        """Return what was counted since the run started."""
        return Activity(self._steps, {name: int(count) for name, count in self._acted.items()})


def gradient_receipts(trainer: Trainer, module: VisionLanguageModule, acts: Activity) -> list[Receipt]:
    """Return the receipts of the gradient stabilisers, or of Lightning's own clipping."""
    options = module.gradient
    if trainer.gradient_clip_val and not options.any_on:
        return [_lightning_clip(float(trainer.gradient_clip_val))]
    enabled = [entry.name for entry in fields(options) if getattr(options, entry.name) is not None]
    return [_receipt(module, name, acts) for name in enabled]


def _lightning_clip(threshold: float) -> Receipt:
    switch = "trainer.gradient_clip_val"
    if threshold > _SPIKE:
        return Receipt(
            switch, "gradient", "dead", f"no gradient reaches {threshold:g}", None, "lower it, or set it to null"
        )
    return Receipt(switch, "gradient", "idle", "Lightning clips; how often it acts in the run is not counted")


def _receipt(module: VisionLanguageModule, name: str, acts: Activity) -> Receipt:
    switch = f"gradient.{name}"
    alone = GradientStabilisers(**{name: getattr(module.gradient, name)})
    shown = _cut(alone)
    if not shown < 1:
        return Receipt(
            switch,
            "gradient",
            "dead",
            f"a gradient of norm {_SPIKE:g} on a copy passes it unchanged",
            None,
            f"lower its threshold, or set model.{switch} to null",
        )
    trigger = f"on a copy it keeps {shown:.2g} of a spike of {_SPIKE:g}"
    count = acts.acted.get(name, 0)
    verdict: Verdict = "alive" if count else "idle"
    what = "left out" if name == "skip_spikes" else "shortened"
    counted = f"{count} of {acts.steps} steps {what}" if acts.steps else "no step has been made yet"
    return Receipt(switch, "gradient", verdict, f"{counted}; {trigger}", float(count))


@cache
def _cut(options: GradientStabilisers) -> float:
    """Return the share of a spike that is left of the step that it asks for; 1 where nothing acts."""
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
