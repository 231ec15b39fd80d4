"""Some batches ahead, in order, and nothing beyond a failure."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.images.jpeg_batch import Jpeg, JpegBatch
from lightning_moevlm.data.load.device_stage import DeviceStage
from lightning_moevlm.data.load.gpu_prefetch import prefetch
from lightning_moevlm.data.read.reader import Cursor, Delivery, Failure
from tests.data.found_tars import folder_of, keep, three_tars

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
    seen = [(key, counting.asked) for key in _keys(prefetch(counting.items(), CPU, num_ahead))]
    assert seen == list(zip("12345", asked, strict=True))


@pytest.mark.parametrize("num_ahead", [0, 1, 3, 9])
def test_a_failure_comes_in_its_turn_and_is_the_last(num_ahead: int) -> None:
    assert list(_keys(prefetch(_Counting(fails=True).items(), CPU, num_ahead))) == [*"12345", "broken"]


class _Events:
    """Stands in for torch.cuda, and writes down who did what in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.on_side_stream = False
        events = self

        class Event:
            def __init__(self) -> None:
                self.number = sum(calls.startswith("ready") for calls in events.calls)

            def record(self, stream: str) -> None:
                assert stream == "side" and not events.on_side_stream
                events.calls.append(f"ready {self.number}")

        class Current:
            def wait_event(self, event: Event) -> None:
                events.calls.append(f"wait {event.number}")

        @contextmanager
        def stream(side: str) -> Iterator[None]:
            assert side == "side"
            self.on_side_stream = True
            yield
            self.on_side_stream = False

        current = Current()
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: self.calls.append(f"keep {int(tensor[0])}")
        )


def test_the_model_waits_for_the_side_stream_and_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    events = _Events(monkeypatch)

    def prepared() -> Iterator[Delivery | Failure]:
        for number in range(3):
            assert events.on_side_stream
            yield Delivery(Batch(torch.tensor([number]), None, None, (str(number),)), (), {}, "")

    for item in prefetch(prepared(), torch.device("cuda", 0), 1):
        assert isinstance(item, Delivery) and not events.on_side_stream
        events.calls.append(f"model {item.batch.keys[0]}")
    assert events.calls == [
        "ready 0", "ready 1", "wait 0", "keep 0", "model 0",
        "ready 2", "wait 1", "keep 1", "model 1",
        "wait 2", "keep 2", "model 2",
    ]  # fmt: skip


def test_all_that_travels_is_pinned_but_pixels_that_are_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    images = JpegBatch.pack([Jpeg(b"abc", "a"), Jpeg(b"de", "b")])
    batch = Batch(torch.empty(2, 3, 8, 8, device="meta"), torch.zeros(2, 4), torch.ones(2, 4), ("a", "b"))
    travels = pin_memory(Delivery(batch, (), {}, "", images))  # as torch's DataLoader does it
    assert isinstance(travels, Delivery) and travels.batch.keys == ("a", "b")
    assert list(map(id, pinned)) == list(map(id, (batch.text_BL, batch.text_mask_BL, images.bytes_N)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_of_the_loader(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    keep(folder_of(tmp_path / "web", *three_tars(60)), tmp_path / "set")
    data = ShardDataModule(str(tmp_path / "set"), 8, 32, 24, 1000, shuffle_buffer=30)
    expected = list(data.train_dataloader())
    assert len(expected) > 4
    stage = DeviceStage(device, 32, 2**26, None, 0, 0, num_ahead=2, tolerant=False, fills=True)
    arriving = (Delivery(batch, (), {}, "").pin_memory() for batch in expected)
    for item, other in zip(stage(arriving, Cursor(0, 0)), expected, strict=True):
        assert isinstance(item, Delivery)
        batch = item.batch
        assert batch.images_BRYX is not None and batch.images_BRYX.device == device
        assert batch.keys == other.keys
        assert torch.equal(batch.images_BRYX.cpu(), other.images_BRYX)  # type: ignore[arg-type]
        assert torch.equal(batch.text_BL.cpu(), other.text_BL)  # type: ignore[arg-type,union-attr]
