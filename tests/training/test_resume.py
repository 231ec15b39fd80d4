"""Resumed equals uninterrupted, whatever the moment a checkpoint was saved at: on real shards, over epochs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moevlm.records import Batch
from lightning_moevlm.shards.datamodule import ShardDataModule
from lightning_moevlm.shards.scenes import build_scenes
from lightning_moevlm.training import Actions, StepOutput
from tests.training.tiny_fit import tiny_module

NUM_EPOCHS = 3


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

    def after(self, step: int) -> list[tuple[int, int, int, tuple[str, ...], float]]:
        """What came after an optimiser step."""
        taken = next(place for place, one in enumerate(self.seen) if one[0] == step)
        return self.seen[taken + 1 :]


class SaveAlways(Callback):
    """Saves after each step's last micro-batch, after validation, and at the end of an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._save(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, *_: object) -> None:
        self._save(trainer, "epoch")

    def _save(self, trainer: Trainer, moment: str) -> None:
        trainer.save_checkpoint(self.folder / f"{moment}-{trainer.global_step}.ckpt")


class Runs:
    """Runs of one plan, each with a model of its own."""

    def __init__(self, shards: Path, accumulate: int, num_batches: int, validate: bool) -> None:
        self.steps_per_epoch = -(-num_batches // accumulate)
        self._shards = shards
        self._options = {
            "accumulate_grad_batches": accumulate,
            "limit_train_batches": num_batches,
            "limit_val_batches": int(validate),
        }

    def run(self, steps: int, *callbacks: Callback, resume: Path | None = None) -> tuple[Witness, Trainer]:
        """Train until so many steps are done."""
        witness = Witness()
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[witness, *callbacks],
            **self._options,  # type: ignore[arg-type]
        )
        data = ShardDataModule(str(self._shards), 4, 16, 8, 300)
        trainer.fit(tiny_module(Actions()), data, ckpt_path=resume, weights_only=True)
        return witness, trainer

    def checkpoints(self, folder: Path) -> Iterator[Path]:
        """Those of the first epochs, saved at every moment; runs that end after each step save too."""
        first = range(1, (NUM_EPOCHS - 1) * self.steps_per_epoch + 1)
        for step in first:
            self.run(step)[1].save_checkpoint(folder / f"end-{step}.ckpt")
        for path in sorted(folder.glob("*.ckpt")):
            if step_of(path) in first:
                yield path


def step_of(path: Path) -> int:
    """The number in a checkpoint's name."""
    return int(path.stem.split("-")[1])


@pytest.mark.parametrize(
    ("accumulate", "num_batches", "validate"),
    [
        (2, 3, True),
        pytest.param(1, 2, False, marks=pytest.mark.slow),
        pytest.param(2, 4, False, marks=pytest.mark.slow),
        pytest.param(2, 4, True, marks=pytest.mark.slow),
        pytest.param(3, 5, False, marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted(
    shards: Path, tmp_path: Path, accumulate: int, num_batches: int, validate: bool
) -> None:
    # Lightning 2.6 took a checkpoint from an epoch's end for one inside it: batch N + 1 of N was a step of its own
    runs = Runs(shards, accumulate, num_batches, validate)
    total = NUM_EPOCHS * runs.steps_per_epoch
    whole, trainer = runs.run(total, SaveAlways(tmp_path))
    assert len(whole.seen) == NUM_EPOCHS * num_batches
    moments = set()
    for path in runs.checkpoints(tmp_path):
        resumed, again = runs.run(total, resume=path)
        assert resumed.seen == whole.after(step_of(path)), path.stem
        for name, value in trainer.lightning_module.state_dict().items():
            assert torch.equal(value, again.lightning_module.state_dict()[name]), (path.stem, name)
        moments.add(path.stem.split("-")[0])
    assert moments == {"batch", "epoch", "end"} | ({"validation"} if validate else set())


def test_a_run_may_be_resumed_again_and_again(shards: Path, tmp_path: Path) -> None:
    runs = Runs(shards, 2, 3, validate=False)
    whole, _ = runs.run(6)
    seen, resume = [], None
    for step in range(1, 7):
        witness, trainer = runs.run(step, resume=resume)
        seen += witness.seen
        resume = tmp_path / "last.ckpt"
        trainer.save_checkpoint(resume)
    assert seen == whole.seen


def test_longer_epochs_than_before_go_on_where_the_data_is(shards: Path, tmp_path: Path) -> None:
    # 2 of 2 batches are 2 of 4: the epoch is not done, and its other 2 batches come next
    Runs(shards, 1, 2, validate=False).run(2)[1].save_checkpoint(tmp_path / "short.ckpt")
    resumed, _ = Runs(shards, 1, 4, validate=False).run(8, resume=tmp_path / "short.ckpt")
    assert [(number, epoch) for _, number, epoch, *_ in resumed.seen] == [
        (2, 0),
        (3, 0),
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
    ]
