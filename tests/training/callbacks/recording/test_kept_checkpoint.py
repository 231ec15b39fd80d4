"""The checkpoint from before an event stays when `last.ckpt` is overwritten, and few of them are kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moevlm.training.actions import Actions
from lightning_moevlm.training.callbacks import FlightRecorder, LastCheckpoint
from lightning_moevlm.training.callbacks.recording.kept_checkpoint import keep_checkpoint_before
from lightning_moevlm.training.checkpoints.find_checkpoint import find_checkpoint_before
from tests.conftest import step_of
from tests.small_model import pair_batch
from tests.training.small_fit import Poison, fit, tiny_module


@pytest.mark.parametrize("kept", [0, 2])
def test_the_checkpoint_from_before_the_event_stays(tmp_path: Path, kept: int) -> None:
    """Saved at steps 3, 6, 9 and 12; the recorder, which looks every 10 steps, looks before that of 9 is written."""
    best = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=3, save_top_k=1)
    recorder = FlightRecorder(keep=64, every_n_steps=10, max_checkpoints=kept)
    fit(
        tiny_module(Actions()), 12, batches=[pair_batch()] * 12, default_root_dir=tmp_path,
        callbacks=[Poison(8), recorder, best, LastCheckpoint()],
    )  # fmt: skip
    found = {path.name: step_of(path) for path in (tmp_path / "recordings").glob("*.ckpt")}
    assert found == ({"before_step00000008.ckpt": 6} if kept else {})
    assert step_of(tmp_path / "checkpoints/last.ckpt") == 12


def save(path: Path, step: int, **more: Any) -> None:
    whole = {"loops": {}, "optimizer_states": [], "lr_schedulers": [], **more}
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2", "global_step": step, **whole}, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 10 and 20, one of weights alone, and one that is cut short."""
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for step in (10, 20):
        save(checkpoints / f"{step}.ckpt", step)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2", "global_step": 24}, checkpoints / "weights.ckpt")
    (checkpoints / "cut.ckpt").write_bytes((checkpoints / "20.ckpt").read_bytes()[:100])
    return checkpoints


def test_the_newest_whole_checkpoint_before_a_step_is_found(folder: Path) -> None:
    for step, expected in ((31, 20), (21, 20), (20, 10), (11, 10)):
        found = find_checkpoint_before(step, [folder])
        assert found is not None and (found.step, found.path.name) == (expected, f"{expected}.ckpt")
    assert find_checkpoint_before(10, [folder]) is None
    assert find_checkpoint_before(99, [folder / "none", folder / "10.ckpt"]) == (folder / "10.ckpt", 10)


def test_the_first_events_keep_theirs_and_share_them(folder: Path, tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[ModelCheckpoint(folder)], ckpt_path=None)
    kept = tmp_path / "recordings"
    for step in (12, 15, 22, 25):
        keep_checkpoint_before(step, trainer, kept, at_most=2)
    save(folder / "30.ckpt", 30)
    keep_checkpoint_before(31, trainer, kept, at_most=2)
    (folder / "10.ckpt").unlink()
    assert {path.name: step_of(path) for path in kept.iterdir()} == {
        "before_step00000012.ckpt": 10,
        "before_step00000015.ckpt": 10,
        "before_step00000022.ckpt": 20,
        "before_step00000025.ckpt": 20,
    }
    assert len({path.stat().st_ino for path in kept.iterdir()}) == 2
    assert (kept / "before_step00000022.ckpt").stat().st_ino == (folder / "20.ckpt").stat().st_ino


def test_a_disk_without_links_is_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[], ckpt_path=folder / "10.ckpt")
    with caplog.at_level("INFO"):
        keep_checkpoint_before(12, trainer, tmp_path / "recordings", at_most=2)
    assert "checkpoint of step 10 is not kept (Operation not supported)" in caplog.text
