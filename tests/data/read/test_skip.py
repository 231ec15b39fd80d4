"""Skipped training samples: others stand in for them, and every other row of every batch stays as it is."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule

NUM_BATCHES = 12


def data(root: Path, skip: Sequence[str] | None = None, **options: Any) -> ShardDataModule:
    return ShardDataModule(
        str(root), 8, 32, 16, 400, shuffle_buffer=20, skip=None if skip is None else [*skip], **options
    )


def read(module: ShardDataModule) -> list[Batch]:
    return [*islice(iter(module.train_dataloader()), NUM_BATCHES)]


@pytest.fixture(scope="module")
def whole(scenes_root: Path) -> list[Batch]:
    return read(data(scenes_root))


def rows_by_key(batches: list[Batch]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for batch in batches:
        assert batch.images_BRYX is not None and batch.text_BL is not None
        for key, image, text in zip(batch.keys, batch.images_BRYX, batch.text_BL, strict=True):
            found[key] = image.clone(), text.clone()
    return found


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_one_sample_is_replaced_and_nothing_else_changes(
    scenes_root: Path, whole: list[Batch], num_workers: int
) -> None:
    """Workers are slow: they are processes."""
    left_out = [whole[5].keys[2], whole[5].keys[3], whole[9].keys[7]]
    now = read(data(scenes_root, left_out, num_workers=num_workers))
    known = rows_by_key(read(data(scenes_root)))
    for number, (before, after) in enumerate(zip(whole, now, strict=True)):
        changed = [row for row, (old, new) in enumerate(zip(before.keys, after.keys, strict=True)) if old != new]
        assert changed == {5: [2, 3], 9: [7]}.get(number, [])
        assert not {*after.keys} & {*left_out} and len({*after.keys}) == 8
        assert after.images_BRYX is not None and after.text_BL is not None
        for key, image, text in zip(after.keys, after.images_BRYX, after.text_BL, strict=True):
            if key in known:  # a stand-in may come from beyond the batches read here
                assert torch.equal(image, known[key][0]) and torch.equal(text, known[key][1])


def test_a_whole_batch_is_replaced_by_samples_that_keep_their_turn(scenes_root: Path, whole: list[Batch]) -> None:
    now = read(data(scenes_root, whole[3].keys))
    assert [batch.keys for number, batch in enumerate(now) if number != 3] == [
        batch.keys for number, batch in enumerate(whole) if number != 3
    ]
    assert now[3].keys == whole[7].keys  # the stream's next batch: there are four streams


def test_a_resume_reads_the_same(scenes_root: Path, whole: list[Batch]) -> None:
    left_out = [*whole[3].keys, whole[5].keys[0]]
    interrupted = data(scenes_root, left_out)
    batches = [*islice(iter(interrupted.train_dataloader()), 4)]
    assert interrupted.train_loader is not None
    state = interrupted.train_loader.state_dict()
    resumed = data(scenes_root, left_out)
    resumed.load_state_dict(state)
    batches += [*islice(iter(resumed.train_dataloader()), NUM_BATCHES - 4)]
    assert [batch.keys for batch in batches] == [batch.keys for batch in read(data(scenes_root, left_out))]
    without = data(scenes_root)  # the option may change at a resume
    without.load_state_dict(state)
    (fifth,) = islice(iter(without.train_dataloader()), 1)
    assert fifth.keys == whole[4].keys


def test_what_cannot_be_skipped_is_refused(scenes_root: Path) -> None:
    everything = [key for batch in read(data(scenes_root)) for key in batch.keys]
    everything += [f"{number:09d}" for number in range(200)]
    with pytest.raises(UserError, match=r"data\.skip leaves none"):
        read(data(scenes_root, everything))
    with pytest.raises(UserError, match=r"data\.skip needs a set with a manifest"):
        ShardDataModule(None, 8, 32, 16, 400, urls="x.tar", skip=["a"])


def test_null_and_an_empty_list_skip_none(scenes_root: Path, whole: list[Batch]) -> None:
    assert [batch.keys for batch in read(data(scenes_root, []))] == [batch.keys for batch in whole]
