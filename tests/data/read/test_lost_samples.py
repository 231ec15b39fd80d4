"""Samples that cannot be used: ended with a message or counted by cause, and never silent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.load.shard_loader import ShardLoader
from tests.data.rewrite import rewrite_shard, spoil_first


def _data(root: Path, max_lost_fraction: float, **options: Any) -> ShardDataModule:
    given = {"batch_size": 8, "image_size": 32, "max_text_len": 16, "vocab_size": 400, "shuffle_buffer": 7}
    return ShardDataModule(str(root), max_lost_fraction=max_lost_fraction, **{**given, **options})


def _train_shards(root: Path) -> list[Path]:
    shards = sorted(root.glob("train-*.tar"))
    assert len(shards) == 8  # 120 samples: 7 shards of 16 and one of 8
    return shards


def _keys(loader: ShardLoader) -> list[tuple[str, ...]]:
    return [batch.keys for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lost_samples_do_not_shorten_an_epoch(scenes_copy: Path, num_workers: int) -> None:
    whole = _keys(_data(scenes_copy, 0.0).train_dataloader())
    _train_shards(scenes_copy)[2].unlink()
    loader = _data(scenes_copy, 0.5, num_workers=num_workers).train_dataloader()
    with pytest.warns(UserWarning, match="samples lost in this epoch: shard_missing 16"):
        keys = _keys(loader)
    assert list(map(len, keys)) == [8] * 15 == list(map(len, whole))
    seen = [key for batch in keys for key in batch]
    # 16 of 120 are lost, so 104 come once and 16 of them, at most, a second time
    assert loader.lost == {"shard_missing": 16}
    assert len(set(seen)) == 104
    assert sum(loader.samples) == 120


def test_the_first_loss_ends_a_run_that_tolerates_none(scenes_copy: Path) -> None:
    _train_shards(scenes_copy)[2].unlink()
    with pytest.raises(UserError, match=r"train-000002\.tar is missing.*data\.max_lost_fraction"):
        _keys(_data(scenes_copy, 0.0).train_dataloader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_losses_than_allowed_end_the_run(scenes_copy: Path, num_workers: int) -> None:
    # 16 of the 120 samples of an epoch are 13 %
    _train_shards(scenes_copy)[2].unlink()
    with pytest.raises(
        UserError, match=r"could not be used \(shard_missing \d+\), more than data.max_lost_fraction 0.1"
    ):
        _keys(_data(scenes_copy, 0.1, num_workers=num_workers).train_dataloader())


def test_a_resumed_run_counts_every_loss_once(scenes_copy: Path) -> None:
    for shard in _train_shards(scenes_copy)[2:4]:
        shard.write_bytes(shard.read_bytes()[:5000])
    whole = _data(scenes_copy, 0.9).train_dataloader()
    with pytest.warns(UserWarning, match="samples lost"):
        expected = [_keys(whole), _keys(whole)]
    for stop in (1, 6, 14):
        first = _data(scenes_copy, 0.9).train_dataloader()
        iterator = iter(first)
        for _ in range(stop):
            next(iterator)
        resumed = _data(scenes_copy, 0.9).train_dataloader()
        resumed.load_state_dict(first.state_dict())
        assert resumed.lost == first.lost
        with pytest.warns(UserWarning, match="samples lost"):
            assert [_keys(resumed), _keys(resumed)] == [expected[0][stop:], expected[1]]
        assert resumed.lost == whole.lost and resumed.samples == whole.samples


def test_a_stream_without_a_usable_sample_ends_the_run(scenes_copy: Path) -> None:
    for shard in _train_shards(scenes_copy):
        shard.unlink()
    with pytest.raises(
        UserError, match=r"none of the 32 samples that one of data\.num_streams reads from scenes is usable"
    ):
        _keys(_data(scenes_copy, 0.99).train_dataloader())


def test_invalid_images_are_lost_one_by_one(scenes_copy: Path) -> None:
    rewrite_shard(scenes_copy, "train", 0, lambda name, data: b"no image" if name.endswith("3.jpg") else data)
    loader = _data(scenes_copy, 0.5).train_dataloader()
    with pytest.warns(UserWarning, match="image_undecodable"):
        keys = _keys(loader)
    assert list(map(len, keys)) == [8] * 15
    assert set(loader.lost) == {"image_undecodable"} and 0 < loader.lost["image_undecodable"] <= 16


def test_validation_counts_losses_and_continues(scenes_copy: Path) -> None:
    data = _data(scenes_copy, 0.5)
    before = sum(map(len, _keys(data.val_dataloader())))
    victims: list[str] = []

    def spoil(name: str, data: bytes) -> bytes:
        if name.endswith(".txt") and not victims:
            victims.append(name.removesuffix(".txt"))
            return b"\xff\xfe\xff"
        return data

    rewrite_shard(scenes_copy, "val", 0, spoil)
    with pytest.warns(UserWarning, match="text_not_utf8 1"):
        keys = [key for batch in _keys(_data(scenes_copy, 0.5).val_dataloader()) for key in batch]
    assert len(keys) == len(set(keys)) == before - 1
    assert victims[0] not in keys


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_evaluation_batch_that_lost_all_its_samples_is_refused(scenes_copy: Path, num_workers: int) -> None:
    options = {"batch_size": 4, "num_streams": 2, "num_workers": num_workers}
    # 12 samples in 3 batches of 4; stream 0 reads the first 8 for batches 0 and 2, stream 1 the last 4 for batch 1
    spoil_first(scenes_copy, "val", 3)
    with pytest.warns(UserWarning, match="image_undecodable 3"):
        assert [len(keys) for keys in _keys(_data(scenes_copy, 0.9, **options).val_dataloader())] == [1, 4, 4]
    spoil_first(scenes_copy, "val", 4)
    with pytest.raises(UserError, match=r"lost all of its 4 samples: .* cannot be decoded .*data\.batch_size"):
        _keys(_data(scenes_copy, 0.9, **options).val_dataloader())


def test_the_share_is_an_option_from_0_to_1(scenes_root: Path) -> None:
    with pytest.raises(UserError, match="max_lost_fraction is 1"):
        _data(scenes_root, 1.0)


def test_a_run_with_losses_logs_them_and_one_without_leave_ends(
    workplace: Path, moevlm: Callable[..., str], scenes_copy: Path
) -> None:
    from mlflow import MlflowClient

    from tests.small_run import SMALL, budget

    _train_shards(scenes_copy)[2].unlink()
    printed = moevlm("fit", *SMALL, *budget(4), f"--data.root={scenes_copy}", code=2)
    assert "train-000002.tar is missing" in printed and "Traceback" not in printed
    moevlm("fit", *SMALL, *budget(15), f"--data.root={scenes_copy}", "--data.max_lost_fraction=0.5")
    client = MlflowClient(f"sqlite:///{workplace / 'runs/mlflow.db'}")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.data.metrics["data/skipped/shard_missing"] == 16
    assert run.data.metrics["data/samples/scenes"] == 15 * 8
    assert run.data.metrics["data/epochs/scenes"] == 1.0
