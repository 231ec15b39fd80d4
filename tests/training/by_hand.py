"""Helpers for tests of one action by hand: routers, optimisers, made-up facts of a step."""

from collections.abc import Callable
from functools import partial

import torch
from torch.optim import SGD, AdamW, Optimizer

from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.losses import LayerCounts
from lightning_moevlm.model.routers import (
    CosineRouter,
    NoisyTopKRouter,
    Router,
    SigmoidBiasRouter,
    SoftRouter,
    TopKRouter,
)
from lightning_moevlm.training.actions.action import StepFacts, Training
from tests.routing import NOTHING
from tests.small_model import pair_batch

LEARNED: dict[str, Callable[[int, int], Router]] = {
    "top-1": TopKRouter,
    "noisy, learned": partial(NoisyTopKRouter, learned_noise=True),
    "sigmoid with bias": partial(SigmoidBiasRouter, top_k=1, per_modality=True),
    "cosine": CosineRouter,
    "soft": SoftRouter,
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": partial(AdamW, lr=1e-2, weight_decay=0.1),
    "SGD": partial(SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
}
PATH = "blocks.1.ffn.image"


def training_of(backbone: Backbone, *optimizers: Optimizer) -> Training:
    return Training(backbone, backbone, optimizers, (), seed=0)


def facts(step: int, load_E: list[int] | None = None, loss: float = 1.0) -> StepFacts:
    """Counts of a layer of images; the row of texts is empty."""
    if load_E is None:
        return StepFacts(step, {}, {}, torch.tensor(loss))
    load_AE = torch.tensor([load_E, [0] * len(load_E)])
    counts = LayerCounts(load_AE, load_AE, load_AE.sum(dim=1), 1 / len(load_E), NOTHING)
    return StepFacts(step, {PATH: counts}, {}, torch.tensor(loss))


def update(backbone: Backbone, optimizer: Optimizer) -> None:
    """Gradients of one batch, ready for the step."""
    batch = pair_batch()
    optimizer.zero_grad()
    backbone(batch.images_BRYX, batch.text_BL, batch.text_mask_BL).tokens_BSD.pow(3).mean().backward()
