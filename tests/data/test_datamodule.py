"""The data module under a real Trainer: what it hands out, and that resumed runs see the same batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from tests.data.recording import Recorder, quiet_trainer


def _data(root: Path, **options: Any) -> ShardDataModule:
    given = {"root": str(root), "batch_size": 8, "image_size": 32, "max_text_len": 16, "vocab_size": 400}
    return ShardDataModule(**{**given, **options})


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "estimate steps"])
def whole(request: pytest.FixtureRequest, scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """32 steps that nothing interrupts."""
    whole = Recorder(request.param)
    data = _data(scenes_root)  # the order is the same for any number of workers
    quiet_trainer(tmp_path_factory.mktemp("whole"), max_steps=32, enable_checkpointing=False).fit(whole, data)
    assert len(set(whole.seen)) == 32
    assert len(data.train_dataloader()) == 15
    return whole


@pytest.mark.parametrize(
    ("num_workers", "stop"),
    # workers change the processes and no order, so that each is stopped at other places
    [(0, 5), (0, 15), (2, 18), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0, 18), (2, 5), (2, 15)))],
)
def test_resumed_training_sees_the_batches_of_an_uninterrupted_run(
    scenes_root: Path, tmp_path: Path, num_workers: int, stop: int, whole: Recorder
) -> None:
    # 120 samples, 15 batches per epoch: stop in the first epoch, at its end, and in the second.
    # estimate_steps: asking for it makes loaders before the state is restored (Lightning 20550)
    estimate_steps = whole.estimate_steps
    saver = ModelCheckpoint(tmp_path, "at", every_n_train_steps=stop, save_top_k=-1, enable_version_counter=False)
    first = Recorder(estimate_steps)
    quiet_trainer(tmp_path, max_steps=stop, callbacks=[saver]).fit(first, _data(scenes_root, num_workers=num_workers))
    assert first.seen == whole.seen[:stop]

    second = Recorder(estimate_steps)
    trainer = quiet_trainer(tmp_path, max_steps=32, enable_checkpointing=False)
    trainer.fit(second, _data(scenes_root, num_workers=num_workers), ckpt_path=tmp_path / "at.ckpt")
    assert second.seen == whole.seen[stop:]


@pytest.mark.parametrize("limit", [3, 0.5])
def test_resume_with_limited_epochs(scenes_root: Path, tmp_path: Path, limit: float) -> None:
    whole = Recorder()
    trainer = quiet_trainer(tmp_path, max_epochs=4, limit_train_batches=limit, enable_checkpointing=False)
    trainer.fit(whole, _data(scenes_root))
    saver = ModelCheckpoint(tmp_path, "at", every_n_epochs=1, save_top_k=-1, enable_version_counter=False)
    first = Recorder()
    quiet_trainer(tmp_path, max_epochs=2, limit_train_batches=limit, callbacks=[saver]).fit(first, _data(scenes_root))
    second = Recorder()
    trainer = quiet_trainer(tmp_path, max_epochs=4, limit_train_batches=limit, enable_checkpointing=False)
    trainer.fit(second, _data(scenes_root), ckpt_path=tmp_path / "at.ckpt")
    assert first.seen + second.seen == whole.seen


def test_checkpoints_are_read_back_without_unpickling_code(scenes_root: Path, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "at", every_n_train_steps=2, enable_version_counter=False)
    quiet_trainer(tmp_path, max_steps=2, callbacks=[saver]).fit(Recorder(), _data(scenes_root))
    state = torch.load(tmp_path / "at.ckpt", weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state[0]["batch"] == 2 and state[0]["epoch"] == 0


def test_overfitting_repeats_the_same_batches(scenes_root: Path, tmp_path: Path) -> None:
    model = Recorder()
    trainer = quiet_trainer(tmp_path, max_epochs=3, overfit_batches=1, enable_checkpointing=False)
    trainer.fit(model, _data(scenes_root))
    assert len(model.seen) == 3
    assert len(set(model.seen)) == 1


def test_validation_is_whole_and_prediction_reads_the_test_split(scenes_root: Path, tmp_path: Path) -> None:
    model, data = Recorder(), _data(scenes_root)
    quiet_trainer(tmp_path).validate(model, data, verbose=False)
    assert sum(map(len, model.validated)) == data.manifest.num_samples("val")
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        assert sum(batch.num_samples for batch in loader) == data.manifest.num_samples("test")


def test_it_describes_the_set(scenes_root: Path) -> None:
    data = _data(scenes_root)
    assert data.manifest.name == "scenes"
    assert data.manifest_digest == data.manifest.digest
    assert data.tokenizer.vocab_size == data.manifest.tokenizer.vocab_size


@pytest.mark.parametrize("name", ["scenes", "openmoji"])
def test_a_missing_set_names_the_exact_command(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    with pytest.raises(UserError, match=f"moevlm data build {name} --out {root}`"):
        _data(root).prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 300}, "raise it to"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"image_size": 4}, "data.image_size is 4"),
        ({"max_text_len": 2}, "data.max_text_len is 2"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer is 0"),
        ({"prefetch": 0}, "data.prefetch is 0"),
        ({"max_pixels": 0}, "data.max_pixels is 0"),
        ({"root": "pipe:touch PWNED"}, "shell commands are not allowed"),
        ({"root": "ftp://x.org/set"}, "only file, http, https, s3, gs are allowed"),
        ({"root": "s3://x/set", "cache_gib": 0}, "data.cache_gib is 0"),
    ],
)
def test_bad_arguments_are_refused_before_training(scenes_root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _data(**{"root": scenes_root, **options}).prepare_data()


def test_images_of_another_size_are_scaled(scenes_root: Path) -> None:
    batch = next(iter(_data(scenes_root, image_size=48).train_dataloader()))
    assert batch.images_BRYX is not None and batch.images_BRYX.shape == (8, 3, 48, 48)


def test_an_altered_tokenizer_is_refused(scenes_copy: Path) -> None:
    path = scenes_copy / "tokenizer.json"
    path.write_text(path.read_text().replace("[MASK]", "[BLOT]"))
    with pytest.raises(UserError, match="not the one of its manifest"):
        _data(scenes_copy).prepare_data()
