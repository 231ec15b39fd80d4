"""Optimisers and schedules that could not train are refused before anything is written."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch.optim import Adagrad, AdamW, Optimizer, RMSprop, SparseAdam
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training import VisionLanguageModule, try_schedule
from lightning_moevlm.training.optim import MuonAdamW, StableAdamW, WarmupCosine
from tests.small_model import small_vl_moe
from tests.training.small_fit import fit


def module(schedule: Callable[[Optimizer], Any] | None = None, **options: Any) -> VisionLanguageModule:
    return VisionLanguageModule(small_vl_moe(), schedule=schedule, **options)


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        (partial(StepLR, step_size=0), "model.schedule StepLR fails after step 1: integer modulo by zero; change its"),
        (partial(CosineAnnealingLR, T_max=0), "model.schedule CosineAnnealingLR fails after step 1: "),
        (partial(CyclicLR, base_lr=0.1, max_lr=0.2, step_size_up=0), "model.schedule cannot be built: float division"),
        (
            partial(ExponentialLR, gamma=-1.0),
            "model.schedule ExponentialLR gives the learning rate -0.001 after step 1",
        ),
        (
            partial(LambdaLR, lr_lambda=lambda step: 1 / (step - 7) ** 2),
            "model.schedule LambdaLR fails after step 7: division by zero",
        ),
        (
            partial(OneCycleLR, max_lr=0.1, total_steps=39),
            r"model.schedule OneCycleLR has total_steps 39, below trainer.max_steps 40: set total_steps to \$\{tra",
        ),
        (
            ReduceLROnPlateau,
            "model.schedule ReduceLROnPlateau follows a metric, and schedules here follow opti",
        ),
    ],
)
def test_a_schedule_that_would_fail_is_refused(schedule: Callable[[Optimizer], Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        try_schedule(module(schedule, optimizer=partial(AdamW, lr=1e-3)), max_steps=40)


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        partial(StepLR, step_size=3),
        partial(ConstantLR, total_iters=0),
        partial(OneCycleLR, max_lr=0.1, total_steps=40),
        partial(WarmupCosine, total_steps=10),
    ],
)
def test_a_trial_leaves_no_trace(schedule: Callable[[Optimizer], LRScheduler] | None) -> None:
    tried = module(schedule)
    before = [p.detach().clone() for p in tried.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try_schedule(tried, max_steps=40)
    assert all(p.grad is None and bool((p == was).all()) for p, was in zip(tried.parameters(), before, strict=True))
    assert len(fit(tried, 2).outputs) == 2


def test_an_epoch_budget_tries_one_step() -> None:
    try_schedule(module(partial(OneCycleLR, max_lr=0.1, total_steps=5)))  # how many steps there will be is not known


@pytest.mark.parametrize("optimizer", [AdamW, StableAdamW, MuonAdamW, Adagrad, RMSprop])
def test_an_eps_of_0_is_refused(optimizer: Callable[..., Optimizer]) -> None:
    # the embedding of a word that no text has: m = v = 0, and 0 / (sqrt(0) + 0) is no number
    with pytest.raises(UserError, match=r"eps"):
        module(optimizer=partial(optimizer, eps=0.0)).build_optimizer()


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (SparseAdam, "model.optimizer SparseAdam needs sparse gradients, and all gradients here are dense"),
        (partial(AdamW, lr=float("nan")), "model.optimizer cannot"),
        (partial(AdamW, betas=(0.9,)), "model.optimizer cannot be built: "),
        (partial(AdamW, betas=(0.9, float("nan"))), "model.optimizer cannot"),
    ],
)
def test_an_optimiser_that_could_not_train_is_refused(optimizer: Callable[..., Optimizer], told: str) -> None:
    with pytest.raises(UserError, match=told):
        module(optimizer=optimizer).build_optimizer()


def test_an_eps_that_is_0_in_float16_is_refused_under_16_true() -> None:
    # 2^-24 = 5.96e-8 is the smallest number of float16; the default eps of AdamW, 1e-8, is 0 there, and the second
    # loss was no number whatever the model
    with pytest.raises(
        UserError, match=r"has eps 1e-08, which is 0 in float16: .* under trainer.precision 16-true; set it"
    ):
        fit(module(), 2, precision="16-true")
    seen = fit(module(optimizer=partial(AdamW, eps=1e-4)), 3, precision="16-true").outputs
    assert len(seen) == 3 and all(bool(output["loss"].isfinite()) for output in seen)
