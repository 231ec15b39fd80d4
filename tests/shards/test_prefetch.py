"""One batch ahead on the device, and yet the state is that of the batch that was handed out."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_moevlm.records import Batch
from lightning_moevlm.shards.datamodule import ShardDataModule
from lightning_moevlm.shards.loader import ShardLoader
from lightning_moevlm.shards.prefetch import DevicePrefetcher

CPU = torch.device("cpu")


def _loader(root: Path, num_workers: int = 0) -> ShardLoader:
    data = ShardDataModule(str(root), 8, 32, 24, 1000, num_workers=num_workers, shuffle_buffer=30)
    return data.train_dataloader()


def _keys(batches: Iterator[Batch] | DevicePrefetcher) -> list[tuple[str, ...]]:
    return [batch.keys for batch in batches]


class _Counting:
    """Five batches; says how many have been asked for."""

    def __init__(self) -> None:
        self.place = 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Batch]:
        while self.place < 5:
            self.place += 1
            yield Batch(torch.full((1, 3, 2, 2), self.place, dtype=torch.uint8), None, None, (str(self.place),))

    def state_dict(self) -> int:
        return self.place

    def load_state_dict(self, state_dict: int) -> None:
        self.place = state_dict


def test_it_is_one_batch_ahead_and_its_state_is_not() -> None:
    loader = _Counting()
    prefetched = DevicePrefetcher(loader, CPU)
    assert len(prefetched) == 5 and prefetched.state_dict() == 0
    seen = []
    for batch in prefetched:
        seen.append((int(batch.keys[0]), loader.place, prefetched.state_dict()))
    # the loader is one ahead, until there is nothing more
    assert seen == [(1, 2, 1), (2, 3, 2), (3, 4, 3), (4, 5, 4), (5, 5, 5)]


def test_what_was_prefetched_and_not_handed_out_comes_after_a_resume() -> None:
    prefetched = DevicePrefetcher(_Counting(), CPU)
    iterator = iter(prefetched)
    assert [next(iterator).keys for _ in range(2)] == [("1",), ("2",)]
    resumed = DevicePrefetcher(_Counting(), CPU)
    resumed.load_state_dict(prefetched.state_dict())
    assert _keys(resumed) == [("3",), ("4",), ("5",)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_over_a_real_loader_order_and_resume_are_unchanged(scenes_root: Path, num_workers: int) -> None:
    plain = _loader(scenes_root, num_workers)
    epochs = [_keys(iter(plain)) for _ in range(2)]
    prefetched = DevicePrefetcher(_loader(scenes_root, num_workers), CPU)
    assert len(prefetched) == len(plain)
    assert _keys(prefetched) == epochs[0]
    iterator = iter(prefetched)
    assert [next(iterator).keys for _ in range(3)] == epochs[1][:3]
    resumed = DevicePrefetcher(_loader(scenes_root, num_workers), CPU)
    resumed.load_state_dict(prefetched.state_dict())
    assert _keys(resumed) == epochs[1][3:]


def test_preparation_is_done_once_on_each_batch_on_the_device() -> None:
    devices = []

    def brighter(batch: Batch, device: torch.device) -> Batch:
        devices.append(device)
        assert batch.images_BRYX is not None
        return batch._replace(images_BRYX=batch.images_BRYX + 100)

    values = [int(batch.images_BRYX.max()) for batch in DevicePrefetcher(_Counting(), CPU, brighter)]  # type: ignore[union-attr]
    assert values == [101, 102, 103, 104, 105]
    assert devices == [CPU] * 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_of_the_loader(scenes_root: Path) -> None:
    device = torch.device("cuda", 0)
    expected = list(_loader(scenes_root))
    for batch, other in zip(DevicePrefetcher(_loader(scenes_root), device), expected, strict=True):
        assert batch.images_BRYX is not None and batch.images_BRYX.device == device
        assert batch.keys == other.keys
        assert torch.equal(batch.images_BRYX.cpu(), other.images_BRYX)  # type: ignore[arg-type]
        assert torch.equal(batch.text_BL.cpu(), other.text_BL)  # type: ignore[arg-type,union-attr]
