"""The loader counts how long training waited for batches, and not what training did meanwhile."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.load import shard_loader
from lightning_moevlm.data.load.shard_loader import ShardLoader


def test_waiting_is_counted_up_to_each_batch(scenes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Slow:
        device = torch.device("cpu")

        def __call__(self, arriving: Iterator[Any], start: object) -> Iterator[Any]:
            nonlocal now
            for delivery in arriving:
                now += 2.0
                yield delivery

    monkeypatch.setattr(shard_loader.time, "perf_counter", lambda: now)
    given = ShardDataModule(str(scenes_root), 8, 32, 24, 1000).train_dataloader()
    loader = ShardLoader(given._reader, 0, stage=Slow())  # type: ignore[arg-type]
    for number, _ in enumerate(loader, start=1):
        assert loader.waited_seconds == 2.0 * number
        now += 5.0  # the step
    assert number == len(loader) and loader.waited_seconds == 2.0 * number
