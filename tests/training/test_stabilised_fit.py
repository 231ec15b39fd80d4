"""Optimisers, schedules and gradient stabilisers under Lightning: by the command line, and in a Trainer."""

import json
import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.step_records import BatchSize, LossReport, ObjectiveOutput, Term
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.losses import AuxiliaryLosses, ByOverflow, LoadBalance
from lightning_moevlm.model.routers import SigmoidBiasRouter
from lightning_moevlm.training import Actions, VisionLanguageModule
from lightning_moevlm.training.actions import ActionRunner, ReviveDeadExperts
from lightning_moevlm.training.callbacks import DivergenceGuard
from lightning_moevlm.training.optim import AdaGC, GradientStabilisers, GroupOptions, SkipSpikes, StableAdamW, ZClip
from tests.conftest import last_checkpoint, runs
from tests.small_model import pair_batch, small_vl_moe
from tests.small_run import SMALL, budget
from tests.training.test_fit import Moevlm, history

OPTIM = "lightning_moevlm.training.optim"


def scheduled(name: str, **extra: object) -> str:
    """The option for a schedule of two steps."""
    return "--model.schedule=" + json.dumps(
        {"class_path": f"{OPTIM}.{name}", "init_args": {"total_steps": 2, "warmup": 0.5, **extra}}
    )


@pytest.mark.parametrize(
    "options",
    [
        (
            "--model.optimizer.init_args.fused=true",
            "--model.gradient.skip_spikes.window=8",
            "--model.gradient.clip_value=0.1",
            "--model.gradient.clip_norm=null",
        ),
        (f"--model.optimizer={OPTIM}.StableAdamW", "--model.gradient.z_clip.z=2", scheduled("WarmupLinear")),
        (
            f"--model.optimizer={OPTIM}.Lion",
            "--model.gradient.ada_gc.warmup_steps=1",
            scheduled("WarmupStableDecay", decay=0.5),
        ),
        (
            f"--model.optimizer={OPTIM}.MuonAdamW",
            "--model.gradient.clip_update=0.5",
            "--model.groups.router_lr_multiplier=0.1",
            "--model.groups.independent_weight_decay=true",
        ),
        (
            f"--model.optimizer={OPTIM}.MuonAdamW",
            "--model.optimizer.init_args={per_head: true, num_polishing: 2, neuron_beta: 0.95}",
            "--model.gradient.skip_spikes.window=8",
        ),
        (f"--model.optimizer={OPTIM}.Hyperball", "--model.optimizer.init_args.base=adam"),
    ],
    ids=["AdamW", "StableAdamW", "Lion", "MuonAdamW", "Muon variants", "Hyperball"],
)
def test_every_optimiser_schedule_and_stabiliser_by_the_command_line(
    options: tuple[str, ...], moevlm: Moevlm, workplace: Path
) -> None:
    moevlm("fit", *SMALL, "--trainer.fast_dev_run=true", *options)


EVERY_ONE = (
    f"--model.optimizer={OPTIM}.StableAdamW",
    "--model.gradient.clip_value=0.05",
    "--model.gradient.z_clip.warmup_steps=2",
    "--model.gradient.ada_gc.warmup_steps=2",
    "--model.gradient.clip_update=0.5",
    "--model.gradient.skip_spikes={sigma: 0.01, window: 4}",
)


@pytest.mark.slow
def test_stabilised_training_resumes_bit_for_bit(moevlm: Moevlm, workplace: Path) -> None:
    moevlm("fit", *SMALL, *budget(10, val_every=5), *EVERY_ONE)
    whole = last_checkpoint(workplace).rename(workplace / "whole.ckpt")
    moevlm("fit", *SMALL, *budget(5, total=10), *EVERY_ONE)
    half = last_checkpoint(workplace).rename(workplace / "half.ckpt")
    moevlm("fit", *SMALL, *budget(10, val_every=5), *EVERY_ONE, "--ckpt_path", str(half))
    one, two = (torch.load(path, weights_only=True) for path in (whole, last_checkpoint(workplace)))
    assert all(torch.equal(tensor, two["state_dict"][name]) for name, tensor in one["state_dict"].items())
    for name, memory in one["gradient_stabilisers"].items():
        for part, value in memory.items():
            torch.testing.assert_close(value, two["gradient_stabilisers"][name][part], rtol=0, atol=0, equal_nan=True)
    assert set(one["gradient_stabilisers"]) == {"z_clip", "ada_gc", "skip_spikes"}
    first, _, third = runs(workplace)
    for key in ("optim/clip_coefficient", "optim/skipped_steps", "optim/update_norm", "optim/grad_norm"):
        late = [point for point in history(workplace, first, key) if point[0] > 5]
        assert len(late) == 5 and history(workplace, third, key) == late
    skipped = dict(history(workplace, first, "optim/skipped_steps"))
    moved = dict(history(workplace, first, "optim/update_norm"))
    assert 1 <= skipped[10] < 9  # what is above the mean is a spike here
    for step in range(2, 11):  # a skipped step moves nothing, any other does
        assert (moved[step] == 0.0) is (skipped[step] > skipped[step - 1])


def test_clipping_in_two_places_is_refused(moevlm: Moevlm, workplace: Path) -> None:
    printed = moevlm("fit", *SMALL, *budget(1), "--trainer.gradient_clip_val=1.0", code=2)
    assert "trainer.gradient_clip_val is 1.0 and model.gradient is set: clip in one place" in printed
    moevlm("fit", *SMALL, *budget(1), "--trainer.gradient_clip_val=1.0", "--model.gradient.clip_norm=null")


class Spoilt(VisionLanguageModule):
    """A module whose task loss is replaced at chosen micro-steps, on one rank: added, so that gradients stay."""

    at: Mapping[int, float] = MappingProxyType({})
    rank = 0

    def seed_noise(self, step: int) -> None:
        super().seed_noise(step)
        self.micro_batch = step

    def compute_losses(
        self, batch: Batch, step: int, whole: BatchSize | None = None
    ) -> tuple[ObjectiveOutput, LossReport]:
        output, report = super().compute_losses(batch, step, whole)
        if self.micro_batch in self.at and self.global_rank == self.rank:
            report = report._replace(task=report.task | {"spoilt": Term(torch.tensor(self.at[self.micro_batch]), 1.0)})
        return output, report

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[arg-type]
        if self.gradient_events is not None:
            self.seen = [*getattr(self, "seen", []), (float(self.gradient_events.norm), self._flat())]

    def _flat(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.parameters()])


def fit(module: VisionLanguageModule, steps: int, **options: object) -> VisionLanguageModule:
    batches = [pair_batch(2, seed=seed) for seed in range(64)]
    options = {"accelerator": "cpu", "devices": 1} | options
    trainer = Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module


def spoilt(at: dict[int, float], **options: object) -> Spoilt:
    module = Spoilt(small_vl_moe(), optimizer=lambda groups: StableAdamW(groups, lr=1e-3), **options)
    module.at = at
    return module


@pytest.mark.parametrize("bad", [1e6, math.nan])
def test_a_spoilt_step_is_left_out_and_training_continues(bad: float) -> None:
    module = fit(spoilt({6: bad}, gradient=GradientStabilisers(skip_spikes=SkipSpikes(window=8))), 8)
    moved = [not torch.equal(a, b) for (_, a), (_, b) in pairwise(module.seen)]
    assert moved == [True] * 5 + [False, True]  # the seventh step, from the sixth on
    assert int(module.gradient_events.num_skipped) == 1


def test_a_step_that_is_left_out_teaches_nothing() -> None:
    # the sixth step routed tokens and had a norm like any other, but was undone: what learns from steps did not see it
    class Memories(Callback):
        after: ClassVar[dict[int, dict[str, list[torch.Tensor]]]] = {}

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            assert isinstance(pl_module, VisionLanguageModule)
            runner = next(one for one in trainer.callbacks if isinstance(one, ActionRunner))
            state = runner.state_dict() | pl_module._gradient_control.state_dict()
            self.after[trainer.global_step] = {
                "bias": [buffer.clone() for name, buffer in pl_module.named_buffers() if "bias_AE" in name],
                "weight": list(state["loss_weights"].values()),
                "idle": [idle_E.clone() for idle_E in state["revive_dead_experts"]["idle"].values()],
                "z_clip": list(state["z_clip"].values()),
                "ada_gc": list(state["ada_gc"].values()),
            }

    module = Spoilt(
        small_vl_moe(router=partial(SigmoidBiasRouter, top_k=1), capacity=Capacity(1.0, 1.0)),
        losses=AuxiliaryLosses(LoadBalance(ByOverflow(0.05))),
        gradient=GradientStabilisers(z_clip=ZClip(), ada_gc=AdaGC(), skip_spikes=SkipSpikes(window=8)),
        actions=Actions(revive_dead_experts=ReviveDeadExperts(idle_steps=50)),
        init_std=0.3,
    )
    module.at = {6: math.nan}
    fit(module, 9, callbacks=[Memories()])
    # micro-step 6 is the seventh, from 6 to 7 steps done
    moved = {
        name: [
            any(
                not torch.equal(a, b)
                for a, b in zip(Memories.after[step][name], Memories.after[step + 1][name], strict=True)
            )
            for step in (5, 6, 7)
        ]
        for name in ("bias", "weight", "z_clip", "ada_gc")
    }
    assert all(seen == [True, False, True] for seen in moved.values()), moved
    before, skipped, later = (torch.cat(Memories.after[step]["idle"]) for step in (6, 7, 8))
    assert torch.equal(before, skipped) and not torch.equal(skipped, later)


def test_a_run_that_leaves_spoilt_steps_out_has_not_diverged_until_every_one_is() -> None:
    nan_from_5 = dict.fromkeys(range(5, 40), math.nan)  # that is the sixth step
    options = GradientStabilisers(skip_spikes=SkipSpikes(window=8))
    for at, steps in (({6: math.nan}, 20), (nan_from_5, 10)):  # the fifth NaN in a row is that of the tenth step
        module = fit(spoilt(at, gradient=options), 20, callbacks=[DivergenceGuard(every_n_steps=5)])
        assert module.trainer.global_step == steps
    module = fit(spoilt({6: math.nan}), 20, callbacks=[DivergenceGuard(every_n_steps=5)])
    assert module.trainer.global_step == 10


def test_stabilisers_see_the_whole_step_under_accumulation() -> None:
    # twelve micro-batches are six steps; the spoilt second half of step 5 is half of its mean loss, and the norms of a
    # step that is left out are not remembered
    options = GradientStabilisers(z_clip=ZClip(), ada_gc=AdaGC(), skip_spikes=SkipSpikes(window=8))
    module = fit(spoilt({9: 1e6}, gradient=options), 6, accumulate_grad_batches=2)
    state = module._gradient_control.state_dict()
    assert int(state["z_clip"]["num_steps"]) == int(state["ada_gc"]["num_steps"]) == 5
    assert int(module.gradient_events.num_skipped) == 1
    assert 4e5 < float(state["skip_spikes"]["loss_J"][-2]) < 6e5


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    options = GradientStabilisers(clip_norm=0.1)
    plain = fit(spoilt({}, gradient=options), 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = fit(spoilt({}, gradient=options), 1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaled.seen[0][0] == pytest.approx(plain.seen[0][0], rel=0.02)  # and not 1024 times that


def test_fused_optimisers_are_refused_where_they_unscale_themselves() -> None:
    module = VisionLanguageModule(
        small_vl_moe(),
        optimizer=lambda groups: torch.optim.AdamW(groups, fused=True),
        gradient=GradientStabilisers(clip_norm=1.0),
    )
    with pytest.raises(
        UserError, match=r"AdamW is fused and trainer\.precision is 16-mixed: gradients would be clipped while scaled"
    ):
        fit(module, 1, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])


def test_frozen_routers_stay_while_the_rest_learns() -> None:
    module = spoilt({}, groups=GroupOptions(router_lr_multiplier=0.0), gradient=GradientStabilisers(clip_norm=1.0))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, 2)
    stayed = {name for name, p in module.named_parameters() if torch.equal(p, before[name])}
    assert stayed == {name for name in before if ".router." in name}


def _fit_two_ranks(folder: Path, gradient: GradientStabilisers) -> Spoilt:
    seed_everything(0, verbose=False)
    module = TwoRanks(small_vl_moe(), optimizer=_stable, gradient=gradient)
    module.at, module.rank, module.folder = {6: 1e6}, 1, str(folder)
    fit(module, 8, devices=2, strategy="ddp_spawn", use_distributed_sampler=False)
    return module


def _stable(groups: list) -> StableAdamW:
    return StableAdamW(groups, lr=1e-3)


class TwoRanks(Spoilt):
    """Writes the observations of each rank; its process ends with the training."""

    folder = ""

    def on_train_end(self) -> None:
        torch.save([flat for _, flat in self.seen], Path(self.folder) / f"{self.global_rank}.pt")


@pytest.mark.slow
def test_ranks_skip_the_same_step(tmp_path: Path) -> None:
    # the loss spikes on the second rank alone: both leave the step out, and stay equal
    _fit_two_ranks(tmp_path, GradientStabilisers(clip_norm=1.0, ada_gc=AdaGC(), skip_spikes=SkipSpikes(window=8)))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first) == 8 and all(map(torch.equal, first, second))
    moved = [not torch.equal(a, b) for a, b in pairwise(first)]
    assert moved == [True] * 5 + [False, True]
