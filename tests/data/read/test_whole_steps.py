"""Epochs of whole optimiser steps, by hand; what they leave out comes in the next epoch."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.load.shard_loader import ShardLoader
from lightning_moevlm.data.read.mixture import StepClock
from lightning_moevlm.data.read.whole_steps import refuse_smaller_step, whole_steps
from tests.data.read.test_reader import _keys, _reader, _stored


def test_whole_steps_by_hand() -> None:
    assert [whole_steps(75, per_step) for per_step in (1, 2, 25, 50, 75, 100)] == [75, 74, 75, 50, 75, 100]
    assert whole_steps(0, 4) == 0


def test_epochs_without_an_end_have_no_last_step() -> None:
    refuse_smaller_step(float("inf"), 4, "a stream")
    refuse_smaller_step(8, 4, "a loader")
    with pytest.raises(UserError, match=r"^a loader makes epochs of 75 batches, .* 50 or 100 batches, .* 25 or 75$"):
        refuse_smaller_step(75, 50, "a loader")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_sample_is_read_although_steps_do_not_divide_an_epoch(scenes_root: Path, num_workers: int) -> None:
    whole = _reader(scenes_root)
    batches = len(_stored(scenes_root, "train")) // 8
    per_step = batches - 1
    loader = ShardLoader(replace(whole, clock=StepClock(per_step, per_step)), num_workers)
    assert len(loader) == per_step
    epochs = [_keys(loader) for _ in range(batches)]
    assert {len(epoch) for epoch in epochs} == {per_step}
    seen = Counter(key for epoch in epochs for batch in epoch for key in batch)
    stored = _stored(scenes_root, "train")
    times = sum(seen.values()) / len(stored)
    # of each stream's range every sample comes once a lap; what the streams do not share evenly is left out
    assert len(seen) > len(stored) - whole.num_streams
    assert max(seen.values()) <= times + 2 and min(seen.values()) >= times - 3
