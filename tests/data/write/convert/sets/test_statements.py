"""Statements about pairs of scenes: their truth by another judge, twins, splits, and what a run reads of them."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.images.augment import Augment
from lightning_moevlm.data.images.decode import decode_image
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.inspect.html_page import write_page
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.demo.pair_statements import KINDS
from tests.data.statement_set import convert_statements, is_true, read_members


@pytest.fixture(scope="module")
def statements(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets") / "statements"
    convert_statements(scenes_root, root, per_image=2.0)
    return root


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_each_text_is_true_of_one_pair_and_false_of_another(scenes_root: Path, statements: Path, split: str) -> None:
    scenes, made = read_members(scenes_root, split), read_members(statements, split)
    assert len(made) in (2 * len(scenes), 2 * len(scenes) + 1)
    truths: Counter[tuple[str, bool]] = Counter()
    kinds: Counter[str] = Counter()
    for members in made.values():
        about, text = json.loads(members["json"]), members["txt"].decode()
        left, right = (scenes[key] for key in about["samples"])  # KeyError: another split
        assert left is not right
        assert (members["jpg"], members["right.jpg"]) == (left["jpg"], right["jpg"])
        truth = is_true(text, left["json"], right["json"])
        assert about["answers"] == [str(truth).lower()], text
        truths[text, truth] += 1
        kinds[about["kind"]] += 1
    assert all(truths[text, True] == truths[text, False] for text, _ in truths)  # the text alone says nothing
    assert set(kinds) == set(KINDS) and max(kinds.values()) - min(kinds.values()) <= 2


def test_the_same_arguments_give_the_same_set(scenes_root: Path, statements: Path, tmp_path: Path) -> None:
    convert_statements(scenes_root, tmp_path / "again", per_image=2.0)
    assert (tmp_path / "again/manifest.json").read_bytes() == (statements / "manifest.json").read_bytes()
    other = convert_statements(scenes_root, tmp_path / "other", per_image=2.0, seed=1)
    assert other.manifest.splits != convert_statements(scenes_root, statements, per_image=2.0).manifest.splits


def test_too_few_scenes_are_refused(scenes_root: Path, tmp_path: Path) -> None:
    from lightning_moevlm.data.write.demo.scenes import build_scenes

    build_scenes(tmp_path / "few", 24, 32, "jpg", 64, seed=0, samples_per_shard=16, vocab_size=300, force=False)
    with pytest.raises(UserError, match=r"split of .*few: \d+ scenes are too few for statements of kind '\w+'"):
        convert_statements(tmp_path / "few", tmp_path / "out", per_image=4.0)
    assert not (tmp_path / "out").exists()


def read(root: Path, **options: object) -> list[Batch]:
    given: dict[str, object] = {
        "root": str(root), "batch_size": 8, "image_size": 32, "max_text_len": 32, "vocab_size": 400,
        "annotation": "answers", "second_image": "right",
    }  # fmt: skip
    return list(ShardDataModule(**{**given, **options}).val_dataloader())  # type: ignore[arg-type]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_both_images_arrive(statements: Path, num_workers: int) -> None:
    made = read_members(statements, "val")
    batches = read(statements, num_workers=num_workers)
    assert sum(batch.num_samples for batch in batches) == len(made)
    for batch in batches:
        assert batch.images_BRYX is not None and batch.second_images_BRYX is not None and batch.answers is not None
        for row, key in enumerate(batch.keys):
            assert torch.equal(batch.images_BRYX[row], decode_image(made[key]["jpg"], "jpg", 32))
            assert torch.equal(batch.second_images_BRYX[row], decode_image(made[key]["right.jpg"], "jpg", 32))
            assert batch.answers.given[row] == tuple(json.loads(made[key]["json"])["answers"])
    first = batches[0].first(3)
    assert torch.equal(first.second_images_BRYX, batches[0].second_images_BRYX[:3])  # type: ignore[arg-type, index]
    bare = batches[0].without_pixels()
    assert bare.images_BRYX.is_meta and bare.second_images_BRYX.is_meta  # type: ignore[union-attr]


def test_the_second_image_is_read_only_on_request(statements: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(
        "lightning_moevlm.data.read.collate.Collate._image",
        lambda self, sample, extension, into: decoded.append(extension) or torch.zeros(3, 32, 32, dtype=torch.uint8),
    )
    assert all(batch.second_images_BRYX is None for batch in read(statements, second_image=None))
    assert set(decoded) == {"jpg"}


def test_a_set_without_it_is_refused(scenes_root: Path, statements: Path) -> None:
    with pytest.raises(UserError, match=r"have one image: they have jpg, json, txt; make a set .*convert statements"):
        read(scenes_root)
    with pytest.raises(UserError, match=r"decodes one image of each sample; set data\.decode cpu"):
        read(statements, decode="device")


def test_both_images_are_augmented_alike(statements: Path) -> None:
    data = ShardDataModule(
        root=str(statements), batch_size=8, image_size=32, max_text_len=32, vocab_size=400, second_image="right",
        augment=Augment(flip=1.0),
    )  # fmt: skip
    plain = ShardDataModule(
        root=str(statements), batch_size=8, image_size=32, max_text_len=32, vocab_size=400, second_image="right"
    )
    flipped, batch = next(iter(data.train_dataloader())), next(iter(plain.train_dataloader()))
    for seen, images in (
        (flipped.images_BRYX, batch.images_BRYX),
        (flipped.second_images_BRYX, batch.second_images_BRYX),
    ):
        assert torch.equal(seen, images.flip(-1))


def test_check_and_show_read_both_images(statements: Path, tmp_path: Path) -> None:
    storage = ShardStorage(str(statements))
    report = check_set(storage)
    assert report.problems == () and sum(count for _, count in report.sizes) == report.manifest.num_samples(
        "train"
    ) + report.manifest.num_samples("val") + report.manifest.num_samples("test")
    page = write_page(storage, "val", 1, None, tmp_path / "page.html")
    assert len(page.samples[0].images) == 2
    assert (tmp_path / "page.html").read_text().count("<figure>") == 2
