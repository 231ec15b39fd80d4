"""The model can learn: one batch is learnt by heart, from every dispatch path."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.optim import Optimizer

from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.dispatch import Dispatcher, GroupedDispatcher, LoopDispatcher, SegmentDispatcher
from lightning_moevlm.model.objectives import Draws, MaskedModelling
from lightning_moevlm.model.routers import ExpertChoiceRouter
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.optim import (
    AdaGC,
    GradientControl,
    GradientStabilisers,
    Hyperball,
    Lion,
    MuonAdamW,
    SkipSpikes,
    StableAdamW,
    ZClip,
    parameter_groups,
)
from tests.small_model import pair_batch, small_moma, small_vl_moe

VL_MOE = partial(small_vl_moe, num_blocks=3)
EXPERTS_CHOOSE = partial(small_moma, router=partial(ExpertChoiceRouter, score="sigmoid"))


@pytest.mark.parametrize(
    ("build", "dispatcher"),
    [
        (VL_MOE, SegmentDispatcher()),
        pytest.param(EXPERTS_CHOOSE, SegmentDispatcher(), marks=pytest.mark.slow),
        # whose gradients are held against each other in tests/dispatch
        pytest.param(VL_MOE, LoopDispatcher(), marks=pytest.mark.slow),
        pytest.param(VL_MOE, GroupedDispatcher(), marks=pytest.mark.slow),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, Dispatcher) else type(part()).__name__,
)
def test_one_batch_is_learnt_by_heart(build: Callable[..., Backbone], dispatcher: Dispatcher) -> None:
    module = VisionLanguageModule(build(dispatcher=dispatcher), MaskedModelling, init_std=0.1)
    batch = pair_batch(2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for step in range(150):
        output = module.objective(module.backbone, batch, Draws(0))  # the same masks every time
        loss = torch.stack([term.raw for term in output.terms.values()]).sum()
        if step == 0:
            first = {name: float(term.raw.detach()) for name, term in output.terms.items()}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = {name: float(term.raw.detach()) for name, term in output.terms.items()}
    assert last["text"] < 0.01 * first["text"] and last["pair_text"] < 0.01 * first["pair_text"]
    assert last["image"] < 0.5 * first["image"] and last["pair_image"] < 0.5 * first["pair_image"]
    assert torch.equal(output.predictions["text"].predicted_M, output.predictions["text"].target_M)


def test_step_does_not_depend_on_earlier_runs() -> None:
    # masks come from (seed, step, sample), so a resumed run draws what the uninterrupted one drew
    module = VisionLanguageModule(small_vl_moe())
    batch = pair_batch()

    def losses(step: int) -> list[float]:
        terms = module.objective(module.backbone, batch, Draws(step)).terms
        return [float(term.raw.detach()) for term in terms.values()]

    first = losses(3)
    torch.rand(100)
    assert losses(3) == first and losses(4) != first


def test_masks_follow_from_seed_stage_and_step() -> None:
    def draw(seed: int, stage: str, step: int) -> float:
        module = VisionLanguageModule(small_vl_moe(), seed=seed)
        return float(module.draws(stage, step).uniform("text", ["sample"], 1))

    assert draw(1, "train", 3) == draw(1, "train", 3)
    assert len({draw(1, "train", 3), draw(2, "train", 3), draw(1, "train", 4), draw(1, "val", 3)}) == 4
    assert draw(1, "val", 3) == draw(1, "val", 4) == draw(1, "test", 0)  # held out: of seed and sample alone


OPTIMIZERS = [
    pytest.param(partial(torch.optim.AdamW, lr=1e-2), id="AdamW"),
    pytest.param(partial(torch.optim.AdamW, lr=1e-2, fused=True), id="AdamW-fused"),
    pytest.param(partial(StableAdamW, lr=1e-2), id="StableAdamW"),
    pytest.param(partial(Lion, lr=1e-3), id="Lion"),
    pytest.param(partial(MuonAdamW, lr=1e-2), id="MuonAdamW"),
    pytest.param(
        partial(MuonAdamW, lr=1e-2, per_head=True, num_polishing=2, neuron_beta=0.95), id="MuonAdamW variants"
    ),
    pytest.param(partial(Hyperball, lr=1e-2, matrix_lr_multiplier=3.0), id="MuonH"),
    pytest.param(partial(Hyperball, lr=1e-2, base="adam", matrix_lr_multiplier=3.0), id="AdamH"),
]
STABILISERS = [
    GradientStabilisers(clip_norm=1.0),
    GradientStabilisers(clip_value=0.1),
    GradientStabilisers(z_clip=ZClip(warmup_steps=5)),
    GradientStabilisers(ada_gc=AdaGC(warmup_steps=5)),
    GradientStabilisers(clip_update=0.5),
    GradientStabilisers(skip_spikes=SkipSpikes(window=16)),
]


@pytest.mark.slow
@pytest.mark.parametrize("build", OPTIMIZERS)
def test_every_optimiser_learns_one_batch_by_heart(build: Callable[..., Optimizer]) -> None:
    learn_by_heart(build, GradientStabilisers(clip_norm=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("options", STABILISERS, ids=lambda options: next(k for k, v in vars(options).items() if v))
def test_one_batch_is_learnt_by_heart_under_every_stabiliser(options: GradientStabilisers) -> None:
    learn_by_heart(partial(torch.optim.AdamW, lr=1e-2), options)


def learn_by_heart(build: Callable[..., Optimizer], options: GradientStabilisers) -> None:
    module = VisionLanguageModule(small_vl_moe(num_blocks=3), MaskedModelling, init_std=0.1)
    optimizer = build(parameter_groups(module.named_parameters()))
    control = GradientControl(options, optimizer)
    batch = pair_batch(2)
    for step in range(150):
        output = module.objective(module.backbone, batch, Draws(0))  # the same masks every time
        loss = torch.stack([term.raw for term in output.terms.values()]).sum()
        if step == 0:
            first = {name: float(term.raw.detach()) for name, term in output.terms.items()}
        optimizer.zero_grad()
        loss.backward()
        control.before_update(loss.detach())
        optimizer.step()
        control.after_update()
    last = {name: float(term.raw.detach()) for name, term in output.terms.items()}
    assert last["text"] < 0.01 * first["text"] and last["pair_text"] < 0.01 * first["pair_text"]
    assert last["image"] < 0.5 * first["image"] and last["pair_image"] < 0.5 * first["pair_image"]
