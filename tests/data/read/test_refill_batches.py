"""Batches that have lost everything: filled from their neighbours, nothing twice, nothing left out."""

import re
from pathlib import Path

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.read.reader import Delivery, Failure
from lightning_moevlm.data.read.refill_batches import spread
from tests.data.rewrite import spoil_first


def _deliveries(*sizes: int) -> list[Delivery]:
    found, first = [], 0
    for size in sizes:
        numbers = torch.arange(first, first + size)
        keys = tuple(map(str, numbers.tolist()))
        batch = Batch(None, numbers[:, None], numbers[:, None] >= 0, keys, 0, (0, size)) if size else Batch(
            None, None, None, (), 0, (0, 0)
        )  # fmt: skip
        found.append(Delivery(batch, (), {} if size else {"shard_missing": 4}, "" if size else "it is missing"))
        first += size
    return found


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((4, 4, 3), (4, 4, 3)),
        ((4, 0, 3), (2, 2, 3)),  # the batch before is cut
        ((0, 5, 3), (2, 3, 3)),  # at the beginning, the one after
        ((4, 3, 0), (4, 1, 2)),
        ((4, 0, 0, 0, 3), (1, 1, 1, 1, 3)),
        ((0, 2, 0, 3), (1, 1, 1, 2)),  # 2 samples for 3 batches: the next one is cut as well
        ((0, 2, 0, 0, 5), (1, 1, 1, 2, 2)),
        ((), ()),
    ],
)
def test_every_batch_gets_something(sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    given = _deliveries(*sizes)
    found = [delivery for delivery in spread(given) if isinstance(delivery, Delivery)]
    assert tuple(delivery.batch.num_samples for delivery in found) == expected
    assert [key for delivery in found for key in delivery.batch.keys] == [str(i) for i in range(sum(sizes))]
    assert [delivery.lost for delivery in found] == [delivery.lost for delivery in given], "losses stay where they were"
    for delivery in found:
        assert delivery.batch.per_source == (0, delivery.batch.num_samples)
        assert delivery.batch.text_BL is not None and delivery.batch.text_mask_BL is not None
        assert delivery.batch.text_BL[:, 0].tolist() == [int(key) for key in delivery.batch.keys]
        assert len(delivery.batch.text_mask_BL) == delivery.batch.num_samples


@pytest.mark.parametrize("sizes", [(0, 0), (0, 2, 0, 0), (1, 0)])
def test_more_batches_than_samples_are_told(sizes: tuple[int, ...]) -> None:
    *_, last = spread(_deliveries(*sizes))
    assert isinstance(last, Failure)
    assert re.search(r"more batches to evaluate on, but can read \d more samples: it is missing", last.message)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_lost_batch_does_not_end_a_validation(scenes_copy: Path, num_workers: int) -> None:
    def data() -> ShardDataModule:
        return ShardDataModule(
            str(scenes_copy), 4, 32, 16, 400, num_streams=2, num_workers=num_workers, max_lost_fraction=0.9
        )

    # 12 samples in 3 batches of 4; stream 0 reads the first 8 for batches 0 and 2, stream 1 the last 4 for batch 1
    whole = [batch.keys for batch in data().val_dataloader()]
    assert list(map(len, whole)) == [4, 4, 4]
    spoil_first(scenes_copy, "val", 7)
    loader = data().val_dataloader()
    with pytest.warns(UserWarning, match="image_undecodable 7"):
        found = [batch.keys for batch in loader]
    # batch 0 is lost, so is all but one sample of batch 2; batch 1 is cut
    assert list(map(len, found)) == [2, 2, 1]
    assert [key for keys in found for key in keys] == [*whole[1], whole[2][-1]]
    assert loader.lost == {"image_undecodable": 7} and len(loader) == 3

    state = data().val_dataloader()
    state.load_state_dict({**loader.state_dict(), "batch": 1})
    with pytest.warns(UserWarning, match="image_undecodable"):
        assert [batch.keys for batch in state] == found[1:]


def test_losing_all_of_a_validation_ends_it(scenes_copy: Path) -> None:
    spoil_first(scenes_copy, "val", 12)
    loader = ShardDataModule(str(scenes_copy), 4, 32, 16, 400, max_lost_fraction=0.9).val_dataloader()
    with pytest.raises(UserError, match="can read 0 more samples"):
        list(loader)
