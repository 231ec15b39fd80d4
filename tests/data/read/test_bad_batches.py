"""Batches spoiled on purpose: what is spoiled, when, and what stays."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.read.bad_batches import BadBatches

TEXT = torch.tensor([[1, 11, 2], [1, 22, 2], [1, 33, 2], [1, 44, 2]])


def _batch(num_pairs: int | None = None) -> Batch:
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    return Batch(images, TEXT.clone(), torch.ones(4, 3, dtype=torch.bool), ("a", "b", "c", "d"), num_pairs)


def test_only_the_steps_of_the_burst_are_spoiled() -> None:
    fault = BadBatches("repeated", begin=5, num_steps=2)
    spoiled = [step for step in range(9) if not torch.equal(fault.spoil(_batch(), step, seed=0).text_BL, TEXT)]  # type: ignore[arg-type]
    assert spoiled == [5, 6]


def test_repeated_samples_are_the_first_one() -> None:
    batch = BadBatches("repeated", 0).spoil(_batch(), 0, seed=0)
    assert batch.text_BL is not None and batch.images_BRYX is not None
    assert batch.text_BL.tolist() == [[1, 11, 2]] * 4
    assert batch.images_BRYX.unique().tolist() == [0]
    assert batch.keys == ("a", "b", "c", "d")


def test_shuffled_texts_belong_to_the_next_image_and_texts_alone_stay() -> None:
    batch = BadBatches("shuffled_texts", 0).spoil(_batch(num_pairs=3), 0, seed=0)
    assert batch.text_BL is not None and batch.images_BRYX is not None
    assert batch.text_BL[:, 1].tolist() == [22, 33, 11, 44]
    assert torch.equal(batch.images_BRYX, _batch().images_BRYX)  # type: ignore[arg-type]


def test_noise_depends_on_seed_and_step_and_leaves_texts() -> None:
    fault = BadBatches("noise_images", 0, 2)
    first, again, later, other = (fault.spoil(_batch(), *at) for at in ((0, 7), (0, 7), (1, 7), (0, 8)))
    assert torch.equal(first.images_BRYX, again.images_BRYX)  # type: ignore[arg-type]
    assert not torch.equal(first.images_BRYX, later.images_BRYX)  # type: ignore[arg-type]
    assert not torch.equal(first.images_BRYX, other.images_BRYX)  # type: ignore[arg-type]
    assert len(first.images_BRYX.unique()) > 200 and torch.equal(first.text_BL, TEXT)  # type: ignore[arg-type,union-attr]


def _data(root: Path, **options: Any) -> ShardDataModule:
    sizes: dict[str, Any] = {"batch_size": 8, "image_size": 32, "max_text_len": 24, "vocab_size": 640}
    return ShardDataModule(root=str(root), **sizes, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_spoils_training_batches_and_no_others(scenes_root: Path, num_workers: int) -> None:
    def read(data: ShardDataModule) -> list[Batch]:
        batches = iter(data.train_dataloader())
        return [next(batches) for _ in range(4)]

    clean = read(_data(scenes_root))
    data = _data(scenes_root, num_workers=num_workers, bad_batches=BadBatches("repeated", 1, 2))
    spoiled = read(data)
    assert [batch.keys for batch in spoiled] == [batch.keys for batch in clean]
    equal = [torch.equal(a.images_BRYX, b.images_BRYX) for a, b in zip(clean, spoiled, strict=True)]  # type: ignore[arg-type]
    assert equal == [True, False, False, True]
    val, clean_val = (next(iter(each.val_dataloader())) for each in (data, _data(scenes_root)))
    assert torch.equal(val.images_BRYX, clean_val.images_BRYX)


def test_refusals_say_what_to_change(scenes_root: Path) -> None:
    with pytest.raises(UserError, match=r"num_steps is 0: choose 1 or more"):
        BadBatches("repeated", 0, 0)
    with pytest.raises(UserError, match=r"data.decode is device: set data.decode cpu"):
        _data(scenes_root, decode="device", bad_batches=BadBatches("repeated", 0))
    alone = _batch()._replace(images_BRYX=None)
    for fault in ("noise_images", "shuffled_texts"):
        with pytest.raises(UserError, match="choose repeated"):
            BadBatches(fault, 0).spoil(alone, 0, seed=0)  # type: ignore[arg-type]
