"""Runs a model with the choices of its earlier checkpoints, layer by layer: when was routing good enough?

    experts = those that the checkpoint of step t chooses on the same samples and masks
    weights = the final router's, by place: its best choice weighs what the best one of step t gets

The choices of frozen-routing replay (`training/callbacks/recording/frozen_routing.py`), in evaluation and in one layer.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lightning_moevlm.atlas.causal.effects import Effect, group_effects
from lightning_moevlm.atlas.causal.groups import EVERY
from lightning_moevlm.atlas.causal.scores import Change, score_samples
from lightning_moevlm.atlas.probe.probe_set import ProbeSet
from lightning_moevlm.atlas.routing.route import move_batch
from lightning_moevlm.atlas.routing.trace import TracedLayer
from lightning_moevlm.common.progress import track
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.objectives import Draws, Objective


def freeze_choices(
    backbone: Backbone,
    objective: Objective,
    draws: Draws,
    load: Callable[[Path], Backbone],
    checkpoints: Sequence[tuple[int, Path]],
    probe: ProbeSet,
    layers: Sequence[TracedLayer],
    batch_size: int = 32,
) -> dict[tuple[int, str], Effect]:
    """Return the effect of each checkpoint's choices in each layer on the loss of all samples, by step and layer.

    p is corrected over the layers of a step. Two models are in memory at a time.

    Args:
        backbone: the final model, in evaluation mode.
        objective: of its training, in evaluation mode.
        draws: source of masks.
        load: returns the model of a checkpoint, in evaluation mode.
        checkpoints: optimiser steps and files.
        probe: the samples.
        layers: those whose choices are frozen; soft slots choose nothing and are left out.
        batch_size: samples of a forward pass.

    Raises:
        UserError: an objective without losses of single samples.
    """
    device = next(backbone.parameters()).device
    found: dict[tuple[int, str], Effect] = {}
    course = sorted(dict(checkpoints).items())
    for step, file in track(course, len(course), "running with earlier choices"):
        earlier = load(file).to(device)
        changes = {each.layer: Change(each.layer, choices_of=earlier) for each in layers if not each.is_soft}
        batches = (move_batch(each.batch, device) for each in probe.batches(batch_size))
        scored = score_samples(objective, backbone, batches, draws, changes)
        every = {EVERY: np.ones(len(scored.keys), np.bool_)}
        found |= {(step, each.change): each.loss for each in group_effects(scored, every)}
    return found
