"""A batch knows what else its optimiser step holds, and looking ahead changes neither order nor place."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.load.shard_loader import ShardLoader
from lightning_moevlm.data.load.steps_ahead import StepsAhead, look_ahead
from lightning_moevlm.data.read.reader import Delivery, Failure
from tests.data.recording import Recorder, quiet_trainer
from tests.small_model import cut, pair_batch


def keys_of(batch: Batch) -> list[tuple[str, ...]]:
    assert batch.step is not None
    return [one.keys for one in batch.step.batches]


@pytest.mark.parametrize("first", [0, 4])
def test_batches_come_in_their_order_with_those_of_their_step(first: int) -> None:
    batches = cut(pair_batch(8), 1)
    arriving = iter([Delivery(batch, (), {}, "") for batch in batches])
    found = [item.batch for item in look_ahead(arriving, first, 4) if isinstance(item, Delivery)]
    assert [batch.keys for batch in found] == [batch.keys for batch in batches]
    assert [keys_of(batch) for batch in found] == [
        [one.keys for one in batches[k : k + 4]] for k in (0,) * 4 + (4,) * 4
    ]
    shown = found[0].step.batches[1]  # type: ignore[union-attr]
    assert shown.images_BRYX.is_meta and torch.equal(shown.text_BL, batches[1].text_BL)  # type: ignore[union-attr]
    assert torch.equal(found[1].images_BRYX, batches[1].images_BRYX)  # type: ignore[arg-type]


def test_amid_a_step_the_rest_is_known() -> None:
    batches = cut(pair_batch(6), 1)
    arriving = iter([Delivery(batch, (), {}, "") for batch in batches])
    found = [item.batch for item in look_ahead(arriving, 2, 4) if isinstance(item, Delivery)]
    assert [len(keys_of(batch)) for batch in found] == [2, 2, 4, 4, 4, 4]


def test_a_failure_comes_after_the_batches_before_it() -> None:
    def arriving() -> Iterator[Delivery | Failure]:
        yield Delivery(pair_batch(1), (), {}, "")
        yield Failure("gone")

    delivery, failure = look_ahead(arriving(), 0, 4)
    assert isinstance(delivery, Delivery) and failure == Failure("gone")


def test_a_loader_of_ones_own_looks_ahead_every_epoch() -> None:
    loader = StepsAhead(cut(pair_batch(4), 1), 2)
    assert len(loader) == 4
    for _ in range(2):
        assert [len(keys_of(batch)) for batch in loader] == [2] * 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_looks_ahead_has_the_same_order_and_place(scenes_root: Path, num_workers: int) -> None:
    def loader(per_step: int) -> ShardLoader:
        data = ShardDataModule(str(scenes_root), 4, 32, 16, 400, num_workers=num_workers)
        plain = data.train_dataloader()
        return ShardLoader(plain._reader, num_workers, per_step=per_step)

    plain, ahead = loader(1), loader(3)
    for number, (one, other) in enumerate(zip(plain, ahead, strict=True)):
        assert one.keys == other.keys and torch.equal(one.images_BRYX, other.images_BRYX)  # type: ignore[arg-type]
        assert plain.state_dict() == ahead.state_dict()
        assert one.step is None and other.keys in keys_of(other)
        if number == 7:
            state = ahead.state_dict()
    resumed = loader(3)
    resumed.load_state_dict(state)
    assert [batch.keys for batch in resumed] == [batch.keys for batch in _epoch(loader(1))][8:]


@pytest.mark.parametrize("num_batches", [1, 6])
def test_a_fast_dev_run_is_the_beginning_of_the_real_run(scenes_root: Path, tmp_path: Path, num_batches: int) -> None:
    def fit(**options: int) -> StepRecorder:
        model = StepRecorder()
        trainer = quiet_trainer(tmp_path, accumulate_grad_batches=4, enable_checkpointing=False, **options)
        trainer.fit(model, ShardDataModule(str(scenes_root), 4, 32, 16, 400))
        return model

    # 6 batches do not make whole steps of 4: a limit of 6 would be refused, a fast_dev_run of 6 is not
    trial, real = fit(fast_dev_run=num_batches), fit(max_steps=2)
    assert len(trial.steps) == num_batches and trial.steps == real.steps[:num_batches]
    assert {len(step) for step in trial.steps} == {4}


class StepRecorder(Recorder):
    """steps: the keys of each batch's optimiser step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[tuple[str, ...]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.steps.append(keys_of(batch))
        return super().training_step(batch, batch_idx)


def _epoch(loader: ShardLoader) -> list[Batch]:
    return list(loader)
