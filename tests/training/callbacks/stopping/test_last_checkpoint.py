"""`last.ckpt` is the last validated step or the end of a run, beside any other checkpoints."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_moevlm.training.callbacks import LastCheckpoint
from lightning_moevlm.training.checkpoints.checkpoint_file import find_best_checkpoint
from tests.conftest import step_of
from tests.tracking.tiny import TinyModule

SCORES = {10: 6.0, 20: 5.0, 30: 4.0, 40: 3.0, 50: 1.0, 60: 2.0}
"""Values of validations, by step: step 50 is the best of 60."""


class Scored(TinyModule):
    """Validates to scores that are written beforehand."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/task_loss", SCORES.get(self.global_step, 7.0))


def fit(folder: Path, *callbacks: Callback, resume: Path | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=[*callbacks, LastCheckpoint()],
        **{"max_epochs": -1, "max_steps": 60, "val_check_interval": 10, "check_val_every_n_epoch": None} | options,
    )
    ones = DataLoader(TensorDataset(torch.ones(40, 1)))
    trainer.fit(Scored(), ones, ones, ckpt_path=resume, weights_only=True)
    return trainer


def best(top_k: int = 1, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(monitor="val/task_loss", save_top_k=top_k, save_on_train_epoch_end=False, **options)


@pytest.mark.parametrize("top_k", [0, 1, -1])
def test_the_last_is_the_last_and_the_best_has_another_name(top_k: int, tmp_path: Path) -> None:
    """Lightning 2.6 left last.ckpt at step 50, where the last of the best was saved."""
    fit(tmp_path, best(top_k))
    last = tmp_path / "checkpoints/last.ckpt"
    assert step_of(last) == 60
    found = find_best_checkpoint(last)
    assert found is None if top_k == 0 else found is not None and step_of(found) == 50
    assert len(list(last.parent.iterdir())) == {0: 1, 1: 2, -1: 7}[top_k]


@pytest.mark.parametrize(
    ("options", "callbacks", "steps"),
    [
        ({"limit_val_batches": 0, "max_steps": 7}, (), 7),
        ({"max_steps": 17}, (), 17),
        ({"max_steps": -1, "max_epochs": 1, "val_check_interval": 30}, (), 40),
        ({}, (EarlyStopping("val/task_loss", patience=1, min_delta=10.0),), 20),
    ],
    ids=["no validation", "between two validations", "an epoch", "early stop"],
)
def test_the_end_of_training_is_saved(
    options: dict[str, Any], callbacks: tuple[Callback, ...], steps: int, tmp_path: Path
) -> None:
    fit(tmp_path, *callbacks, **options)
    assert step_of(tmp_path / "checkpoints/last.ckpt") == steps


def test_where_the_time_is_up_is_saved(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_time=timedelta(seconds=0.3), max_steps=-1, limit_val_batches=0)
    assert step_of(tmp_path / "checkpoints/last.ckpt") == trainer.global_step > 0


def test_a_checkpoint_between_validations_is_also_saved_as_the_last(tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(ModelCheckpoint):
        """Comes last."""

        def on_train_batch_start(self, *_: object) -> None:  # type: ignore[override]
            last = tmp_path / "elsewhere/last.ckpt"
            seen.append(step_of(last) if last.exists() else 0)

    every_three = ModelCheckpoint(tmp_path / "elsewhere", every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, every_three, Look(), max_steps=7, limit_val_batches=0)
    assert seen == [0, 0, 0, 3, 3, 3, 6]
    assert step_of(tmp_path / "elsewhere/last.ckpt") == 7  # in the folder of the first that names one
    assert not list(tmp_path.rglob("last-v*"))


def test_a_run_that_has_moved_still_knows_its_best(tmp_path: Path) -> None:
    fit(tmp_path / "before", best(), max_steps=50)
    (tmp_path / "before").rename(tmp_path / "after")
    last = tmp_path / "after/checkpoints/last.ckpt"
    fit(tmp_path / "after", best(), resume=last)
    assert not (tmp_path / "before").exists()
    # step 60 is worse than step 50, and Lightning would have taken it for the best: it forgets what lies elsewhere
    assert sorted(map(step_of, last.parent.iterdir())) == [50, 60]
    found = find_best_checkpoint(last)
    assert step_of(last) == 60 and found is not None and step_of(found) == 50


def test_resumed_from_the_best_there_is_still_one_last(tmp_path: Path) -> None:
    """Lightning went on with last-v1.ckpt, since the best did not know of a last one."""
    fit(tmp_path, best())
    last = tmp_path / "checkpoints/last.ckpt"
    found = find_best_checkpoint(last)
    assert found is not None
    fit(tmp_path, best(), resume=found, max_steps=70)
    assert [path.name for path in last.parent.iterdir() if "last" in path.name] == ["last.ckpt"]
    assert step_of(last) == 70
