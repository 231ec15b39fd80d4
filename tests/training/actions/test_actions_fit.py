"""Actions inside of training: when they act, that they survive a resume, that two ranks agree."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR

from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.losses import AuxiliaryLosses, ByOverflow, LoadBalance
from lightning_moevlm.model.routers import SigmoidBiasRouter
from lightning_moevlm.training import Actions, VisionLanguageModule
from lightning_moevlm.training.actions import QKClip, ReviveDeadExperts, Rollback
from lightning_moevlm.training.callbacks import DivergenceGuard, Telemetry
from lightning_moevlm.training.checkpoints.init_optimizer import StartFrom
from lightning_moevlm.training.optim import AdaGC, GradientStabilisers, SkipSpikes, ZClip
from lightning_moevlm.training.unused_parameters import UnusedParameters
from tests.conftest import PROJECT, last_checkpoint, runs
from tests.small_model import small_vl_moe
from tests.small_run import BACKBONE, SMALL, budget
from tests.training.small_fit import LossesSeen, Poison, every_action, fit, tiny_module
from tests.training.test_fit import Moevlm, history


def test_without_actions_nothing_is_brought_along() -> None:
    brought = tiny_module(Actions()).configure_callbacks()
    assert [type(each) for each in brought] == [StartFrom, UnusedParameters]  # which act on nothing


def test_attention_logits_are_measured_on_logging_steps_alone() -> None:
    seen = LossesSeen()
    module = tiny_module(Actions())
    points = fit(module, 5, callbacks=[Telemetry(), seen], log_every_n_steps=2).points
    assert seen.measured == [True, True, False, True, False]
    for block in range(4):
        assert [step for step, _ in points[f"attention_logit_max/block{block}"]] == [1, 2, 4]
    assert not module.backbone.measure_attention


def test_qk_clip_acts_once_per_update_and_keeps_logits_down() -> None:
    free, clipped = (
        fit(
            tiny_module(Actions(qk_clip=QKClip(threshold) if threshold else None), lr=1e-2),
            6,
            callbacks=[Telemetry()],
            accumulate=2,
        ).points
        for threshold in (None, 0.05)
    )
    heads = clipped["action/qk_clipped_heads"]
    assert [step for step, _ in heads] == [1, 2, 3, 4, 5, 6]  # logging steps; each tells of one update
    assert heads[0][1] == 8.0  # 2 heads in 4 blocks
    assert "action/qk_clipped_heads" not in free
    for block in range(4):
        key = f"attention_logit_max/block{block}"
        assert clipped[key][0] == free[key][0]  # the first step is measured before anything acted
        assert clipped[key][-1][1] < 0.3 * free[key][-1][1]


def test_rollback_rescues_a_run_and_the_guard_lets_it() -> None:
    seen = LossesSeen()
    actions = Actions(rollback=Rollback(every_n_steps=2, lookback=1))
    module = tiny_module(actions)
    points = fit(module, 10, callbacks=[Poison(at_step=6), DivergenceGuard(1), seen]).points
    # snapshots after steps 0, 2, 4; the loss of step 6 is no number: back to 4
    assert points["action/rollback_to_step"] == [(6, 4.0)]
    assert [index for index, loss in enumerate(seen.losses, start=1) if not torch.tensor(loss).isfinite()] == [6]
    assert len(seen.losses) == 10 and "stability/first_nonfinite_step" not in points
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    without = fit(tiny_module(Actions()), 10, callbacks=[Poison(at_step=6), DivergenceGuard(1)]).points
    assert without["stability/first_nonfinite_step"] == [(6, 6.0)]


def test_a_step_that_is_taken_back_moves_nothing_else() -> None:
    class Biases(Callback):
        after: ClassVar[dict[int, torch.Tensor]] = {}

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            bias_AE = pl_module.backbone.blocks[1].ffn.image.router.bias_AE
            self.after[trainer.global_step] = bias_AE.clone()

    biases = Biases()
    actions = Actions(rollback=Rollback(every_n_steps=2, lookback=1))
    module = tiny_module(actions, router=SigmoidBiasRouter)
    points = fit(module, 8, callbacks=[Poison(at_step=6), biases]).points
    assert points["action/rollback_to_step"] == [(6, 4.0)]
    assert torch.equal(biases.after[6], biases.after[4])  # loss-free balancing did not act on step 6
    assert not torch.equal(biases.after[5], biases.after[4]) and not torch.equal(biases.after[7], biases.after[6])


def test_rollback_gives_up_and_then_the_guard_stops() -> None:
    actions = Actions(rollback=Rollback(every_n_steps=2, lookback=1, max_rollbacks=2))
    seen = LossesSeen()
    points = fit(tiny_module(actions, lr=1e30), 30, callbacks=[DivergenceGuard(1), seen]).points
    assert [place for _, place in points["action/rollback_to_step"]] == [0.0, 0.0]
    (first,) = points["stability/first_nonfinite_step"]
    assert first[0] > points["action/rollback_to_step"][-1][0] and len(seen.losses) == first[0] < 30


def test_a_spike_is_answered_too() -> None:
    # after step 4 the loss jumps because the weights do; the rule needs no loss that is no number
    class Jump(Poison):
        def on_train_batch_start(self, trainer, pl_module, *_) -> None:  # type: ignore[no-untyped-def]
            if trainer.global_step + 1 == self.at_step:
                self.at_step = 0
                with torch.no_grad():
                    for parameter in pl_module.parameters():
                        parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))

    actions = Actions(rollback=Rollback(every_n_steps=1, lookback=1, window=3, spike_threshold=20.0))
    seen = LossesSeen()
    points = fit(tiny_module(actions), 8, callbacks=[Jump(at_step=5), seen]).points
    assert points["action/rollback_to_step"] == [(5, 4.0)]
    assert seen.losses[4] > 2 * seen.losses[3] and seen.losses[5] < 1.2 * seen.losses[3]


def test_every_action_acts_and_continues_after_a_resume(tmp_path: Path) -> None:
    # after step 4 the rollback goes to a snapshot, and counts are of idle steps, that only the checkpoint knows
    keys = ("action/qk_clipped_heads", "action/router_frozen", "action/rollback_to_step")

    def run(steps: int, poisoned: bool, **options: Path) -> dict[str, list[tuple[int, float]]]:
        callbacks = [Poison(at_step=6)] if poisoned else []
        return fit(tiny_module(every_action(), lr=1e-2), steps, callbacks=callbacks, **options).points

    whole = run(12, True, save_to=tmp_path / "whole.ckpt")
    run(4, False, save_to=tmp_path / "half.ckpt")
    resumed = run(12, True, resume_from=tmp_path / "half.ckpt", save_to=tmp_path / "resumed.ckpt")
    assert whole["action/rollback_to_step"] == [(6, 2.0)] and whole["action/router_frozen"] == [(9, 1.0)]
    assert any(key.startswith("action/revived_experts") for key in whole)
    for key in {*keys, *(key for key in whole if key.startswith("action/revived"))}:
        assert resumed.get(key, []) == [point for point in whole[key] if point[0] > 4], key
    one, two = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "resumed"))
    assert one["global_step"] == two["global_step"] == 12
    assert_equal(one["state_dict"], two["state_dict"], "state_dict")
    assert_equal(one["optimizer_states"], two["optimizer_states"], "optimizer_states")
    assert_equal(one["callbacks"], two["callbacks"], "callbacks")


def assert_equal(one: object, two: object, place: str) -> None:
    """Compare nested records of tensors to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), place  # type: ignore[arg-type]
    elif isinstance(one, dict):
        assert isinstance(two, dict) and one.keys() == two.keys(), place
        for key, value in one.items():
            assert_equal(value, two[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert isinstance(two, list | tuple) and len(one) == len(two), place
        for index, (left, right) in enumerate(zip(one, two, strict=True)):
            assert_equal(left, right, f"{place}.{index}")
    else:
        assert one == two, place


@pytest.mark.slow
def test_actions_from_the_command_line_resumed_equal_uninterrupted(moevlm: Moevlm, workplace: Path) -> None:
    options = (
        f"{BACKBONE}.stabilisers.qk_norm=false",
        "--model.actions.qk_clip.threshold=0.01",
        "--model.actions.revive_dead_experts={idle_steps: 1, every_n_steps: 1}",
        "--model.actions.freeze_router.after_steps=3",
        "--model.actions.rollback={every_n_steps: 2, lookback: 1, window: 2, spike_threshold: 0.5}",
        "--trainer.accumulate_grad_batches=2",
    )
    moevlm("fit", *SMALL, *budget(6, val_every=6), *options)
    whole = last_checkpoint(workplace).rename(workplace / "whole.ckpt")
    moevlm("fit", *SMALL, *budget(3, total=6, val_every=6), *options)
    half = last_checkpoint(workplace).rename(workplace / "half.ckpt")
    moevlm("fit", *SMALL, *budget(6, val_every=6), *options, "--ckpt_path", str(half))
    one, two = (torch.load(path, weights_only=True) for path in (whole, last_checkpoint(workplace)))
    assert one["global_step"] == two["global_step"] == 6
    assert_equal(one["state_dict"], two["state_dict"], "state_dict")
    assert_equal(one["optimizer_states"], two["optimizer_states"], "optimizer_states")
    first, _, third = runs(workplace)
    events = [key for key in first.data.metrics if key.startswith("action/")]
    assert {"action/qk_clipped_heads", "action/router_frozen"} <= set(events)
    for key in events:
        late = [point for point in history(workplace, first, key) if point[0] > 3]
        assert history(workplace, third, key) == late if late else key not in third.data.metrics


@pytest.mark.slow
def test_two_ranks_agree_to_the_bit_with_every_action_on(tmp_path: Path) -> None:
    target = tmp_path / "points.json"
    command = [sys.executable, "-m", "tests.training.two_ranks", str(target)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    subprocess.run(command, cwd=PROJECT, check=True, timeout=200, env=environment)
    points = json.loads(target.read_text())
    assert points["action/rollback_to_step"] == [[6, 2.0]] and points["action/router_frozen"] == [[9, 1.0]]
    assert points["action/qk_clipped_heads"] and any(key.startswith("action/revived_experts") for key in points)


def test_after_a_rollback_all_is_as_it_was_then(tmp_path: Path) -> None:
    # a checkpoint of step 6, which goes back to step 4, is that of step 4 but for the rollback's own state; whatever
    # changes while training must go back with the weights
    class Save(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def changing(step: int) -> dict[str, object]:
        saved = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        saved["callbacks"]["ActionRunner"].pop("rollback")
        # counts of steps and of batches, and the place in the data, go on
        return {key: value for key, value in saved.items() if key not in ("global_step", "epoch", "loops")}

    actions = Actions(
        revive_dead_experts=ReviveDeadExperts(idle_steps=50), rollback=Rollback(every_n_steps=2, lookback=1)
    )
    module = VisionLanguageModule(
        small_vl_moe(router=partial(SigmoidBiasRouter, update_rate=0.1), capacity=Capacity(1.0, 1.0)),
        losses=AuxiliaryLosses(LoadBalance(ByOverflow(0.05))),
        optimizer=partial(AdamW, lr=1e-2),
        gradient=GradientStabilisers(z_clip=ZClip(), ada_gc=AdaGC(), skip_spikes=SkipSpikes(window=4)),
        schedule=partial(ConstantLR, factor=0.5, total_iters=5),
        actions=actions,
        init_std=0.3,
    )
    fit(module, 7, callbacks=[Save(), Poison(at_step=6)])
    then, gone_wrong, back = changing(4), changing(5), changing(6)
    assert_equal(back, then, "checkpoint")
    assert then.keys() >= {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "gradient_stabilisers"}
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "gradient_stabilisers"):
        with pytest.raises(AssertionError):  # all of them had moved on
            assert_equal(gone_wrong[key], then[key], key)
