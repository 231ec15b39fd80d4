"""Resumed equals uninterrupted, for checkpoints from any moment: on real shards, over epochs."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.write.demo.scenes import build_scenes
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.layers import ModelStabilisers
from lightning_moevlm.model.losses import AuxiliaryLosses, ByOverflow, LoadBalance
from lightning_moevlm.model.routers import ExpertChoiceRouter, SigmoidBiasRouter
from lightning_moevlm.training import Actions, StepOutput, VisionLanguageModule
from lightning_moevlm.training.actions import QKClip, ReviveDeadExperts, Rollback
from lightning_moevlm.training.checkpoints.partial_step import restore_gradients
from lightning_moevlm.training.optim import GradientStabilisers, SkipSpikes
from tests.small_model import small_moma, small_vl_moe
from tests.training.small_fit import tiny_module

NUM_EPOCHS = 2
IS_WHOLE = pytest.mark.parametrize(
    "is_whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["each moment once", "everywhere"]
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scenes, with captions in the vocabulary of the small model."""
    root = tmp_path_factory.mktemp("sets") / "scenes"
    build_scenes(root, 40, 32, "jpg", 16, seed=3, samples_per_shard=16, vocab_size=300, force=False)
    return root


class Witness(Callback):
    """Every micro-batch: steps done, number, epoch, samples and loss."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int, tuple[str, ...], float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        loss = float(outputs["report"].total_loss)
        self.seen.append((trainer.global_step, batch_idx, trainer.current_epoch, batch.keys, loss))


class SaveAlways(Checkpoint):
    """Saves after each micro-batch, after validation, and at the end of an epoch: `moment-micro_batches_done`.

    A `Checkpoint`, so that Lightning calls it when all other callbacks are done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_done = 0

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.num_done += 1
        self._save(trainer, "amid" if trainer.fit_loop._should_accumulate() else "step")

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        amid = "amid-" if trainer.fit_loop._should_accumulate() else ""
        self._save(trainer, f"{amid}validation")

    def on_train_epoch_end(self, trainer: Trainer, *_: object) -> None:
        self._save(trainer, "epoch")

    def _save(self, trainer: Trainer, moment: str) -> None:
        trainer.save_checkpoint(self.folder / f"{moment}-{self.num_done}.ckpt")


class StopAfter(Callback):
    """Asks to stop after so many micro-batches."""

    def __init__(self, num_micro_batches: int) -> None:
        self.left = num_micro_batches

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.left -= 1
        trainer.should_stop = self.left <= 0


class Runs:
    """Runs of one plan, each with a model of its own."""

    def __init__(
        self,
        shards: Path,
        accumulate: int,
        num_batches: int,
        validate_every: int = 0,
        module: Callable[[], VisionLanguageModule] | None = None,
        ranks: int = 1,
        limited: bool = True,
    ) -> None:
        self.accumulate = accumulate
        self.num_batches = num_batches
        self._shards = shards
        self._module = module or partial(tiny_module, Actions())
        self._options = {
            "accumulate_grad_batches": accumulate,
            "limit_train_batches": num_batches if limited else None,
            "limit_val_batches": int(validate_every > 0),
            "val_check_interval": validate_every or None,
            "devices": ranks,
            "strategy": "ddp" if ranks > 1 else "auto",
        }

    def run(self, steps: int, *callbacks: Callback, resume: Path | None = None) -> tuple[Witness, Trainer]:
        """Train until so many steps are done."""
        witness = Witness()
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[witness, *callbacks],
            **self._options,  # type: ignore[arg-type]
        )
        data = ShardDataModule(str(self._shards), 4, 16, 8, 300)
        trainer.fit(self._module(), data, ckpt_path=resume, weights_only=True)
        return witness, trainer

    def resume_from_everywhere(self, folder: Path, is_whole: bool = True) -> set[str]:
        """Compare with a run that nothing interrupts; returns the moments at which checkpoints were saved.

        They are those of the first epochs, and those of runs that end after each micro-batch, done or asked to stop;
        unless `is_whole`, the last of each moment in the last step of these epochs.
        """
        total = NUM_EPOCHS * self.num_batches // self.accumulate
        whole, trainer = self.run(total, SaveAlways(folder))
        assert len(whole.seen) == NUM_EPOCHS * self.num_batches
        first = range(1, (NUM_EPOCHS - 1) * self.num_batches + 1)
        first = first if is_whole else first[-self.accumulate :]
        for count in first:
            done, before = whole.seen[count - 1][0], whole.seen[count - 2][0] if count > 1 else 0
            moment = "amid-end" if done == before else "end"
            ended = self.run(done + 1, StopAfter(count)) if moment == "amid-end" else self.run(done)
            ended[1].save_checkpoint(folder / f"{moment}-{count}.ckpt")
        saved: dict[str, list[int]] = {}
        for path in folder.glob("*.ckpt"):
            moment, _, count = path.stem.rpartition("-")
            if int(count) in first:
                saved.setdefault(moment, []).append(int(count))
        for moment, counts in saved.items():
            for count in sorted(counts) if is_whole else [max(counts)]:
                resumed, again = self.run(total, resume=folder / f"{moment}-{count}.ckpt")
                assert resumed.seen == whole.seen[count:], (moment, count)
                for name, value in trainer.lightning_module.state_dict().items():
                    assert torch.equal(value, again.lightning_module.state_dict()[name]), (moment, count, name)
        return set(saved)


def remembering_module() -> VisionLanguageModule:
    """All that is gathered over the micro-batches of a step decides here: gradients, losses, counts, attention."""
    return VisionLanguageModule(
        small_vl_moe(
            router=partial(SigmoidBiasRouter, update_rate=0.1),
            capacity=Capacity(1.0, 1.0),
            stabilisers=ModelStabilisers(qk_norm=False),
        ),
        losses=AuxiliaryLosses(LoadBalance(ByOverflow(0.05), scope="global")),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        gradient=GradientStabilisers(clip_norm=1.0, skip_spikes=SkipSpikes(window=4)),
        actions=Actions(
            qk_clip=QKClip(threshold=0.05),
            revive_dead_experts=ReviveDeadExperts(idle_steps=2, every_n_steps=1),
            rollback=Rollback(every_n_steps=2),
        ),
        init_std=0.1,
    )


@pytest.mark.parametrize(
    ("accumulate", "num_batches", "validate_every"),
    [
        pytest.param(2, 4, 1, marks=pytest.mark.slow),
        pytest.param(2, 4, 3, marks=pytest.mark.slow),
        pytest.param(1, 2, 0, marks=pytest.mark.slow),
        pytest.param(2, 4, 0, marks=pytest.mark.slow),
        pytest.param(2, 4, 4, marks=pytest.mark.slow),
        pytest.param(3, 6, 2, marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted(
    shards: Path, tmp_path: Path, accumulate: int, num_batches: int, validate_every: int
) -> None:
    # Lightning 2.6 took a checkpoint from an epoch's end for one inside it: batch N + 1 of N was a step of its own; and
    # of a step half done it saves nothing
    moments = Runs(shards, accumulate, num_batches, validate_every).resume_from_everywhere(tmp_path)
    ends = {batch for batch in range(1, num_batches + 1) if batch % accumulate == 0}
    validations = {batch for batch in range(1, num_batches + 1) if validate_every and batch % validate_every == 0}
    expected = {"step", "epoch", "end"}
    expected |= {"amid", "amid-end"} if accumulate > 1 else set()
    expected |= {"validation"} if validations & ends else set()
    expected |= {"amid-validation"} if validations - ends else set()
    assert moments == expected


@IS_WHOLE
def test_all_that_a_step_gathers_is_resumed(shards: Path, tmp_path: Path, is_whole: bool) -> None:
    runs = Runs(shards, 2, 4, validate_every=1, module=remembering_module)
    moments = runs.resume_from_everywhere(tmp_path, is_whole)
    assert moments == {"amid", "amid-validation", "amid-end", "step", "validation", "epoch", "end"}


@IS_WHOLE
def test_steps_are_equal_over_the_ends_of_epochs_and_resumed(shards: Path, tmp_path: Path, is_whole: bool) -> None:
    # 34 samples in batches of 4: 8 of them, which 3 per step do not divide; an epoch of the trainer has 2 steps
    runs = Runs(shards, 3, 6, limited=False)
    assert runs.resume_from_everywhere(tmp_path, is_whole) == {"amid", "amid-end", "step", "epoch", "end"}
    whole, _ = runs.run(8)  # 24 batches: three times through the data
    num_samples: Counter[int] = Counter()
    for done, number, _, keys, _ in whole.seen:
        num_samples[done if number % 3 == 2 else done + 1] += len(keys)
    assert num_samples == dict.fromkeys(range(1, 9), 12)
    seen = Counter(key for _, _, _, keys, _ in whole.seen for key in keys)
    assert len(seen) > 32 and set(seen.values()) <= {2, 3, 4}  # 96 of 34: about three times each


@pytest.mark.parametrize(
    ("accumulate", "options", "told"),
    [
        (
            4,
            {"limit_train_batches": 6},
            r"limit_train_batches 6 makes epochs of 6 batches, .* would have 2 batches. Give an epoch",
        ),
        (4, {"limit_train_batches": 6}, r"Give an epoch 4 or 8 batches, or accumulate over 1, 2, 3 or 6$"),
        (2, {"limit_train_batches": 0.4}, r"limit_train_batches 0\.4 makes epochs of 3 batches"),
        (
            4,
            {"overfit_batches": 3},
            r"overfit_batches 3 makes epochs of 3 batches, .*Give an epoch 4 batches, or accumulate over 1 or 3$",
        ),
    ],
)
def test_a_last_step_of_fewer_batches_is_refused(
    shards: Path, accumulate: int, options: dict[str, float], told: str
) -> None:
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=False, accumulate_grad_batches=accumulate, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(UserError, match=told):
        trainer.fit(tiny_module(Actions()), ShardDataModule(str(shards), 4, 16, 8, 300))


def test_a_change_of_accumulation_that_changes_the_order_is_not_resumed(shards: Path, tmp_path: Path) -> None:
    Runs(shards, 3, 6, limited=False).run(1)[1].save_checkpoint(tmp_path / "over.ckpt")
    with pytest.raises(
        UserError,
        match=r"set by trainer\.accumulate_grad_batches, was over its end.*in the checkpoint and is up to its end now",
    ):
        Runs(shards, 2, 8, limited=False).run(4, resume=tmp_path / "over.ckpt")


@pytest.mark.slow
def test_two_ranks_resume_amid_a_step_to_the_bit(shards: Path, tmp_path: Path) -> None:
    # each rank has gradients and losses of its own until the step is done; their mean, given to all, would be rounded
    found = tmp_path / "moments.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.training.resume_ranks", str(shards), str(tmp_path), str(found)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"amid", "amid-end"} <= set(json.loads(found.read_text()))


def test_another_number_of_ranks_resumes_with_the_mean() -> None:
    # two ranks had 1 and 3, and the second alone a gradient of the bias: (1 + 3) / 2 and (0 + 4) / 2 for each of three
    layer = torch.nn.Linear(1, 1)
    saved = [{"weight": torch.full((1, 1), 1.0)}, {"weight": torch.full((1, 1), 3.0), "bias": torch.full((1,), 4.0)}]

    def restored(rank: int, ranks: int) -> list[float | None]:
        layer.zero_grad()
        trainer = cast(Trainer, SimpleNamespace(global_rank=rank, world_size=ranks))
        restore_gradients(layer, saved, trainer)
        return [None if p.grad is None else p.grad.item() for p in (layer.weight, layer.bias)]

    assert restored(2, 3) == restored(0, 1) == [2.0, 2.0]
    assert restored(0, 2) == [1.0, None] and restored(1, 2) == [3.0, 4.0]


def test_a_partial_step_is_not_completed_by_another_number_of_batches(shards: Path, tmp_path: Path) -> None:
    Runs(shards, 2, 4).run(1, SaveAlways(tmp_path))
    with pytest.raises(UserError, match=r"over 2 micro-batches, but trainer\.accumulate_grad_batches is 4"):
        Runs(shards, 4, 4).run(1, resume=tmp_path / "amid-1.ckpt")


def test_an_optimiser_of_other_parameter_groups_is_refused(shards: Path, tmp_path: Path) -> None:
    # as of versions in which stacks of shared experts were no group of their own
    runs, path = Runs(shards, 1, 2), tmp_path / "old.ckpt"
    runs.run(1)[1].save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    groups = saved["optimizer_states"][0]["param_groups"]
    groups[0]["params"] += groups.pop()["params"]
    torch.save(saved, path)
    with pytest.raises(UserError, match=r"groups .*, router \d+, this model .*, expert 4; it is from"):
        runs.run(2, resume=path)


EXPERTS_CHOOSE = partial(small_moma, router=partial(ExpertChoiceRouter, score="sigmoid"))


@pytest.mark.parametrize("build", [small_vl_moe, EXPERTS_CHOOSE], ids=["VLMoE", "MoMa"])
def test_a_run_may_be_resumed_again_and_again(shards: Path, tmp_path: Path, build: Callable[[], Backbone]) -> None:
    runs = Runs(shards, 2, 4, module=lambda: VisionLanguageModule(build(), init_std=0.1))
    whole, _ = runs.run(4)
    seen, resume = [], None
    for step in range(1, 5):
        witness, trainer = runs.run(step, resume=resume)
        seen += witness.seen
        resume = tmp_path / "last.ckpt"
        trainer.save_checkpoint(resume)
    assert seen == whole.seen


def test_longer_epochs_resume_at_the_position_of_the_data(shards: Path, tmp_path: Path) -> None:
    # 2 of 2 batches are 2 of 4: the epoch is not done, and its other 2 batches come next
    Runs(shards, 1, 2).run(2)[1].save_checkpoint(tmp_path / "short.ckpt")
    resumed, _ = Runs(shards, 1, 4).run(8, resume=tmp_path / "short.ckpt")
    assert [(number, epoch) for _, number, epoch, *_ in resumed.seen] == [
        (2, 0),
        (3, 0),
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
    ]
