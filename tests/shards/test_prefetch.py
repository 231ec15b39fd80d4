"""Some batches ahead, in order, and nothing beyond a failure."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_moevlm.records import Batch
from lightning_moevlm.shards.datamodule import ShardDataModule
from lightning_moevlm.shards.device_stage import DeviceStage
from lightning_moevlm.shards.prefetch import prefetched
from lightning_moevlm.shards.reader import Cursor, Delivery, Failure

CPU = torch.device("cpu")


class _Counting:
    """Five deliveries, then a failure if asked for, then what nobody may ask for; says how many were asked for."""

    def __init__(self, fails: bool = False) -> None:
        self.asked = 0
        self._fails = fails

    def items(self) -> Iterator[Delivery | Failure]:
        for number in range(1, 6):
            self.asked = number
            yield Delivery(Batch(None, None, None, (str(number),)), (), {}, "")
        if self._fails:
            self.asked = 6
            yield Failure("broken")
            raise AssertionError("asked beyond a failure")


def _keys(items: Iterator[Delivery | Failure]) -> Iterator[str]:
    for item in items:
        yield item.batch.keys[0] if isinstance(item, Delivery) else item.message


@pytest.mark.parametrize(
    ("num_ahead", "asked"), [(0, [1, 2, 3, 4, 5]), (1, [2, 3, 4, 5, 5]), (3, [4, 5, 5, 5, 5]), (9, [5, 5, 5, 5, 5])]
)
def test_as_many_as_wanted_are_prepared_when_a_batch_is_handed_out(num_ahead: int, asked: list[int]) -> None:
    counting = _Counting()
    seen = [(key, counting.asked) for key in _keys(prefetched(counting.items(), CPU, num_ahead))]
    assert seen == list(zip("12345", asked, strict=True))


@pytest.mark.parametrize("num_ahead", [0, 1, 3, 9])
def test_a_failure_comes_in_its_turn_and_is_the_last(num_ahead: int) -> None:
    assert list(_keys(prefetched(_Counting(fails=True).items(), CPU, num_ahead))) == [*"12345", "broken"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_of_the_loader(scenes_root: Path) -> None:
    device = torch.device("cuda", 0)
    data = ShardDataModule(str(scenes_root), 8, 32, 24, 1000, shuffle_buffer=30)
    expected = list(data.train_dataloader())
    stage = DeviceStage(device, 32, 2**26, None, 0, 0, num_ahead=2, tolerant=False, fills=True)
    arriving = (Delivery(batch, (), {}, "").pin_memory() for batch in expected)
    for item, other in zip(stage(arriving, Cursor(0, 0)), expected, strict=True):
        assert isinstance(item, Delivery)
        batch = item.batch
        assert batch.images_BRYX is not None and batch.images_BRYX.device == device
        assert batch.keys == other.keys
        assert torch.equal(batch.images_BRYX.cpu(), other.images_BRYX)  # type: ignore[arg-type]
        assert torch.equal(batch.text_BL.cpu(), other.text_BL)  # type: ignore[arg-type,union-attr]
