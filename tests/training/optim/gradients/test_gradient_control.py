"""Stabilisers at work: against torch's clipping, updates measured by hand, skipped steps that leave no trace."""

import io
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.optim import (
    AdaGC,
    GradientControl,
    GradientStabilisers,
    Lion,
    SkipSpikes,
    StableAdamW,
    ZClip,
)
from tests.training.optim.optimizers.test_optimizers import OPTIMIZERS, Build, generator

SHAPES = {"matrix": (4, 3), "expert": (2, 4, 3), "vector": (5,)}
ALL_ON = GradientStabilisers(
    clip_norm=1.0,
    clip_value=0.5,
    z_clip=ZClip(warmup_steps=2),
    ada_gc=AdaGC(warmup_steps=2),
    clip_update=0.9,
    skip_spikes=SkipSpikes(window=4, sigma=3.0),
)
LOSS = torch.tensor(1.0)


class Rig:
    """Three parameters, an optimiser and its stabilisers."""

    def __init__(self, build: Build, options: GradientStabilisers, device: str = "cpu") -> None:
        self.params = [nn.Parameter(torch.randn(s, generator=generator(1)).to(device)) for s in SHAPES.values()]
        groups = [{"params": [p], "role": role} for p, role in zip(self.params, SHAPES, strict=True)]
        self.optimizer: Optimizer = build(groups)
        self.control = GradientControl(options, self.optimizer)

    def step(self, seed: int, *, scale: float = 1.0, loss: Tensor = LOSS, without: int | None = None) -> None:
        for place, p in enumerate(self.params):
            p.grad = torch.randn(p.shape, generator=generator(seed)).to(p.device) * scale
            if place == without:
                p.grad = None
        self.control.before_update(loss)
        self.optimizer.step()
        self.control.after_update()

    def values(self) -> list[Tensor]:
        """Parameters and every tensor of the optimiser's state."""
        states = [self.optimizer.state[p] for p in self.params]
        return [p.detach().clone() for p in self.params] + [v.clone() for s in states for v in s.values()]


def select_with_gradients(*gradients: Tensor) -> tuple[list[nn.Parameter], Optimizer]:
    params = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.clone()
    return params, SGD(params, lr=0.1)


@pytest.mark.parametrize("absent", range(len(SHAPES)))
@pytest.mark.parametrize("build", OPTIMIZERS)
def test_a_group_without_gradients_is_unchanged(build: Build, absent: int) -> None:
    # what freezing the routers leaves of their group
    rig = Rig(build, ALL_ON)
    for seed in range(4):
        rig.step(seed)
    before = rig.params[absent].detach().clone()
    rig.step(4, without=absent)
    assert torch.equal(rig.params[absent], before)
    assert all(bool(value.isfinite().all()) for value in rig.values())


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_clip_norm_is_torchs_bit_for_bit(limit: float) -> None:
    gradients = [torch.randn(4, 3, generator=generator(0)), torch.randn(5, generator=generator(1))]
    ours, optimizer = select_with_gradients(*gradients)
    theirs, _ = select_with_gradients(*gradients)
    control = GradientControl(GradientStabilisers(clip_norm=limit), optimizer)
    control.before_update(LOSS)
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
    assert control.events is not None and torch.equal(control.events.norm, norm)
    assert float(control.events.coefficient) == pytest.approx(min(1.0, limit / float(norm)))


def test_clip_value_is_torchs() -> None:
    (p,), optimizer = select_with_gradients(torch.tensor([-3.0, 0.5, 4.0]))
    control = GradientControl(GradientStabilisers(clip_value=1.0), optimizer)
    control.before_update(LOSS)
    assert p.grad.tolist() == [-1.0, 0.5, 1.0]
    # norms sqrt(9 + 0.25 + 16) before, sqrt(1 + 0.25 + 1) after
    assert float(control.events.coefficient) == pytest.approx(math.sqrt(2.25 / 25.25))


def test_z_clip_and_clip_norm_take_the_smaller_of_both() -> None:
    # norms 1, 2, 3, then 10: ZClip says 2.52083, as in its own test
    for limit, expected in ((2.0, 2.0), (2.7, 2.520833)):
        (p,), optimizer = select_with_gradients(torch.zeros(1))
        control = GradientControl(GradientStabilisers(clip_norm=limit, z_clip=ZClip(warmup_steps=3)), optimizer)
        for norm in (1.0, 2.0, 3.0, 10.0):
            p.grad = torch.tensor([norm])
            control.before_update(LOSS)
        assert float(p.grad) == pytest.approx(expected, rel=1e-5)


def test_ada_gc_cuts_the_expert_that_spikes_and_no_other() -> None:
    rig = Rig(partial(SGD, lr=0.1), GradientStabilisers(ada_gc=AdaGC(warmup_steps=1, warmup_norm=1e6)))
    gradients = [torch.ones(shape) for shape in SHAPES.values()]
    for spike in (1.0, 100.0):
        for p, gradient in zip(rig.params, gradients, strict=True):
            p.grad = gradient.clone()
        rig.params[1].grad[1] *= spike
        rig.control.before_update(LOSS)
    matrix, stack, vector = (p.grad for p in rig.params)
    assert torch.equal(matrix, torch.ones(4, 3)) and torch.equal(vector, torch.ones(5))
    assert torch.equal(stack[0], torch.ones(4, 3))
    torch.testing.assert_close(stack[1], torch.full((4, 3), 1.05))  # 1.05 of what it was


def test_ada_gc_of_a_parameter_without_gradient() -> None:
    rig = Rig(partial(SGD, lr=0.1), GradientStabilisers(ada_gc=AdaGC(warmup_steps=1)))
    for p in rig.params:
        p.grad = torch.ones_like(p)
    rig.params[1].grad = None
    rig.control.before_update(LOSS)
    averages = rig.control.state_dict()["ada_gc"]["average_G"]
    assert averages.isinf().tolist() == [False, True, True, False]  # the two experts of the stack were not seen


def test_update_is_clipped_by_hand() -> None:
    # SGD moves (3, 4) and (0.3, 0.4) by 0.1: root mean squares over the rate sqrt(25 / 2) and a tenth of it
    large, small = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    params, optimizer = select_with_gradients(large, small)
    control = GradientControl(GradientStabilisers(clip_update=1.0), optimizer)
    control.before_update(LOSS)
    optimizer.step()
    control.after_update()
    torch.testing.assert_close(params[0].detach(), -0.1 * large / math.sqrt(12.5))
    assert torch.equal(params[1].detach(), -0.1 * small)


def test_update_of_each_expert_is_clipped_by_itself() -> None:
    rig = Rig(partial(SGD, lr=0.1), GradientStabilisers(clip_update=1.0))
    before = rig.params[1].detach().clone()
    for p in rig.params:
        p.grad = torch.ones_like(p) * 0.5
    rig.params[1].grad[1] = 50.0
    rig.control.before_update(LOSS)
    rig.optimizer.step()
    rig.control.after_update()
    moved = before - rig.params[1].detach()
    torch.testing.assert_close(moved, torch.stack([torch.full((4, 3), 0.05), torch.full((4, 3), 0.1)]))


@pytest.mark.parametrize("build", OPTIMIZERS)
@pytest.mark.parametrize("clip_update", [None, 0.5])
@pytest.mark.parametrize(
    "spoil",
    [{"loss": torch.tensor(9.0)}, {"loss": torch.tensor(math.nan)}, {"scale": 1e3}, {"scale": math.nan}],
    ids=["loss", "nan-loss", "norm", "nan-norm"],
)
def test_a_skipped_step_leaves_no_trace(build: Build, clip_update: float | None, spoil: dict[str, object]) -> None:
    options = GradientStabilisers(clip_norm=1.0, clip_update=clip_update, skip_spikes=SkipSpikes(window=4))
    rig = Rig(build, options)
    for seed in range(4):
        rig.step(seed, loss=torch.tensor(1.0 + 0.1 * seed))
    before = rig.values()
    rig.step(9, **spoil)
    assert all(map(torch.equal, before, rig.values()))
    assert int(rig.control.events.num_skipped) == 1
    rig.step(5)
    assert not any(map(torch.equal, before[:3], rig.values()[:3]))
    assert int(rig.control.events.num_skipped) == 1


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_a_first_step_that_is_skipped_was_never_taken(build: Build) -> None:
    options = GradientStabilisers(skip_spikes=SkipSpikes(window=4))
    spoilt, clean = Rig(build, options), Rig(build, options)
    spoilt.step(0, scale=math.nan)
    for rig in (spoilt, clean):
        for seed in (1, 2):
            rig.step(seed)
    assert all(map(torch.equal, spoilt.values(), clean.values()))


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_stabilisers_resume_where_they_were(build: Build) -> None:
    whole, first, second = (Rig(build, ALL_ON) for _ in range(3))
    losses = [torch.tensor(1.0 + 0.1 * (seed % 3)) for seed in range(12)]
    losses[8] = torch.tensor(50.0)
    for seed in range(12):
        whole.step(seed, scale=1 + seed, loss=losses[seed])
    for seed in range(6):
        first.step(seed, scale=1 + seed, loss=losses[seed])
    file = io.BytesIO()
    kept = {"optimizer": first.optimizer.state_dict(), "control": first.control.state_dict(), "params": first.params}
    torch.save(kept | {"params": [p.detach() for p in first.params]}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    for p, value in zip(second.params, kept["params"], strict=True):
        p.data.copy_(value)
    second.optimizer.load_state_dict(kept["optimizer"])
    second.control.load_state_dict(kept["control"])
    for seed in range(6, 12):
        second.step(seed, scale=1 + seed, loss=losses[seed])
    assert all(map(torch.equal, whole.values(), second.values()))
    assert int(second.control.events.num_skipped) == int(whole.control.events.num_skipped) >= 1


def test_a_stabiliser_that_was_off_starts_anew() -> None:
    plain = Rig(partial(AdamW, lr=0.1), GradientStabilisers(clip_norm=1.0))
    plain.step(0)
    assert plain.control.state_dict() == {}
    rig = Rig(partial(AdamW, lr=0.1), ALL_ON)
    rig.control.load_state_dict(plain.control.state_dict())
    rig.step(0)
    assert set(rig.control.state_dict()) == {"z_clip", "ada_gc", "skip_spikes"}


def test_averages_of_another_model_are_refused() -> None:
    control = Rig(partial(AdamW, lr=0.1), ALL_ON).control
    state = control.state_dict()
    state["ada_gc"]["average_G"] = torch.ones(7)
    with pytest.raises(UserError, match="AdaGC averages of 7 tensors, this model has 4"):
        control.load_state_dict(state)


# the AdamW part of MuonAdamW, torch's own, keeps its count from the host on CUDA alone: see the next test
@pytest.mark.parametrize("build", [partial(StableAdamW, lr=0.1), partial(Lion, lr=0.1)], ids=lambda b: b.func)
def test_the_host_does_not_wait_for_the_device(build: Callable[..., Optimizer]) -> None:
    # tensors without memory: whoever asks one for its value fails
    rig = Rig(build, ALL_ON, device="meta")
    for seed in range(3):
        rig.step(seed, loss=torch.tensor(1.0, device="meta"))
    with pytest.raises(RuntimeError, match="meta"):
        float(rig.control.events.norm)


@pytest.mark.gpu
@pytest.mark.parametrize("build", OPTIMIZERS[1:])  # torch's unfused AdamW counts its steps on the host
def test_the_host_does_not_wait_for_cuda(build: Build) -> None:
    rig = Rig(build, ALL_ON, device="cuda")
    loss = torch.tensor(1.0, device="cuda")
    rig.step(0, loss=loss)
    gradients = [torch.randn_like(p) for p in rig.params]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p, gradient in zip(rig.params, gradients, strict=True):
            p.grad = gradient
        rig.control.before_update(loss)
        rig.optimizer.step()
        rig.control.after_update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["clip_norm", "clip_value", "clip_update"])
def test_thresholds_of_zero_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"gradient\.{name} is 0\.0: choose a value above 0, or null"):
        GradientStabilisers(**{name: 0.0})


def test_nothing_is_on_by_default() -> None:
    assert not GradientStabilisers().any_on and GradientStabilisers(clip_value=1.0).any_on
