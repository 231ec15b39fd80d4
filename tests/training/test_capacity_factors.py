"""Capacity factors that change while training: by ramp, and towards a drop rate; resumed, and alike on every pass."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.model.dispatch import ByDropRate, Capacity, PaddedDispatcher
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.losses import AuxiliaryLosses
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import pair_batch, small_vl_moe
from tests.training.small_fit import Fit, fit

LAYER = "blocks.1.ffn.image"


def module(factor: object) -> VisionLanguageModule:
    capacity = Capacity(train_factor=factor)  # type: ignore[arg-type]
    backbone = small_vl_moe(capacity=capacity)
    return VisionLanguageModule(
        backbone, losses=AuxiliaryLosses(None, None), optimizer=partial(SGD, lr=0.1), init_std=0.3
    )


def nominal(fitted: Fit, layer: str = LAYER) -> list[float]:
    """The factor that a layer computed with in every micro-batch: its places x experts / chosen pairs."""
    plans = [named.plan for output in fitted.outputs for named in output["plans"] if named.layer == layer]
    factors = []
    for plan in plans:
        assert isinstance(plan, PairPlan) and plan.capacity_T is not None
        factors.append(float(plan.capacity_T[0]))
    return factors


def test_by_hand() -> None:
    # 10 chosen, 9 kept: 0.1 dropped
    chosen, kept, factor = torch.tensor([6, 4]), torch.tensor([5, 4]), torch.tensor(1.0, dtype=torch.float64)
    moved = [float(ByDropRate(rate, change=1.25).next(factor, chosen, kept)) for rate in (0.05, 0.2, 0.1)]
    assert moved == [1.25, 0.8, 1.0]


def test_a_ramp_is_followed_over_micro_batches_and_resumed(tmp_path: Path) -> None:
    # 4 images of 4 patches: 16 pairs over 4 experts, so a factor f gives ceil(4 f) places: 1, 2, 3, 4, 4 by the ramp
    ramp = Ramp(0.25, 1.0, num_steps=3)
    batches = [pair_batch(seed=seed) for seed in range(10)]
    whole = fit(module(ramp), 5, batches=batches, accumulate=2)
    image_passes = nominal(whole)[::2]  # of images alone, and of pairs
    assert image_passes == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0, 1.0, 1.0]
    fit(module(ramp), 2, batches=batches, accumulate=2, save_to=tmp_path / "two.ckpt")
    rest = fit(module(ramp), 5, batches=batches[4:] + batches[:4], accumulate=2, resume_from=tmp_path / "two.ckpt")
    assert nominal(rest)[::2][:2] == [0.75, 0.75]


def test_a_factor_is_steered_to_a_drop_rate_on_the_counts_of_the_whole_step(tmp_path: Path) -> None:
    rule = ByDropRate(drop_rate=0.3, start=0.5, change=1.5)
    batches = [pair_batch(seed=seed) for seed in range(12)]

    def in_force(built: VisionLanguageModule) -> dict[str, float]:
        layers = {path: each for path, each in built.backbone.named_modules() if isinstance(each, MoEFFN)}
        return {path: float(each.factor_in_force) for path, each in layers.items() if each.factor_in_force is not None}

    whole = module(rule)
    outputs = fit(whole, 6, batches=batches, accumulate=2).outputs
    expected: dict[str, Tensor] = dict.fromkeys(in_force(whole), torch.tensor(0.5, dtype=torch.float64))
    for step in range(6):
        for path in expected:
            plans = [
                each.plan for out in outputs[2 * step : 2 * step + 2] for each in out["plans"] if each.layer == path
            ]
            chosen, kept = (sum(p.chosen_N.sum() for p in plans), sum(p.kept_N.sum() for p in plans))  # type: ignore[union-attr]
            expected[path] = rule.next(expected[path], torch.as_tensor(chosen), torch.as_tensor(kept))
    assert in_force(whole) == {path: float(value) for path, value in expected.items()}
    assert len(set(in_force(whole).values())) > 1  # every layer has its own

    half = module(rule)
    fit(half, 3, batches=batches, accumulate=2, save_to=tmp_path / "three.ckpt")
    resumed = module(rule)
    fit(resumed, 6, batches=batches[6:] + batches[:6], accumulate=2, resume_from=tmp_path / "three.ckpt")
    assert in_force(resumed) == in_force(whole)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_evaluation_and_a_proof_of_capacity_do_not_see_the_factor_of_training() -> None:
    capacity = Capacity(Ramp(0.25, 1.0, 3))
    assert capacity.factor(training=False, in_force=torch.tensor(0.5)) is None
    assert capacity.factor(training=True) == 0.25
    assert Capacity(2.0).factor(training=True, in_force=torch.tensor(0.5)) == 2.0


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Capacity(Ramp(1.0, 0.0, 9)), "train_factor is 0.0"),
        (lambda: ByDropRate(1.0), "drop_rate of an adaptive capacity factor is 1.0"),
        (lambda: ByDropRate(0.1, start=0.0), "start of an adaptive capacity factor is 0.0"),
        (lambda: ByDropRate(0.1, change=0.5), "change of an adaptive capacity factor is 0.5"),
        (
            lambda: MoEFFN(16, capacity=Capacity(ByDropRate(0.1)), dispatcher=PaddedDispatcher(2.0)),
            "capacity.train_factor follows the drop rate",
        ),
    ],
)
def test_senseless_rules_are_refused(build: object, told: str) -> None:
    with pytest.raises(UserError, match=told):
        build()  # type: ignore[operator]
