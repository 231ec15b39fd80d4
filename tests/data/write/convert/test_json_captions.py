"""Captions in a field of the json member: one or several per sample, of which training draws one per epoch."""

import json
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.read.mixture import Source
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.bad_rows import TooManyBadError
from lightning_moevlm.data.write.convert.sources.member_names import MemberNames
from tests.data.found_tars import (
    BOTH,
    Files,
    flat,
    folder_of,
    keep,
    read_set,
    three_tars,
)
from tests.data.sources import make_image

SEVERAL = MemberNames(caption_field="captions")


def write_captions_to_json(field: str = "captions") -> list[Files]:
    return [
        flat(
            *(
                [
                    (f"{i:04d}.jpg", make_image(i)),
                    (
                        f"{i:04d}.json",
                        json.dumps({field: [f"first of {i}", f"second of {i}", " "], "url": "x"}).encode(),
                    ),
                ]
                for i in range(20 * t, 20 * t + 20)
            )
        )
        for t in range(3)
    ]


@BOTH
def test_captions_in_json_need_an_option_and_one_is_drawn_in_every_epoch(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
    folder = folder_of(tmp_path / "in", *write_captions_to_json())
    with pytest.raises(
        UserError, match=r"samples have no \.txt.* give --caption_field captions, or --caption_member null"
    ):
        convert_it(folder, tmp_path / "set")
    manifest = convert_it(folder, tmp_path / "set", names=SEVERAL).manifest
    assert manifest.members == ("jpg", "json") and manifest.layout.caption_field == "captions"
    report = check_set(ShardStorage(str(tmp_path / "set")))
    assert report.problems == () and {card.modality for card in report.cards} == {"pairs"}

    def epochs(seed: int, num_workers: int = 0) -> list[dict[str, str]]:
        data = ShardDataModule(str(tmp_path / "set"), 1, 16, 16, 400, num_workers, num_streams=1, seed=seed)
        loader, spell = data.train_dataloader(), data.tokenizer
        found = []
        for _ in range(2):
            texts: dict[str, str] = {}
            for batch in loader:
                assert batch.text_BL is not None
                texts[batch.keys[0]] = spell.decode(batch.text_BL[0].tolist())
            found.append(texts)
        return found

    first, second = epochs(0)
    assert first != second and first.keys() == second.keys()
    assert {text.split()[0] for text in first.values()} == {"first", "second"}
    assert epochs(0, num_workers=1) == [first, second]
    assert epochs(1)[0] != first
    texts = ShardDataModule(
        None, 4, 16, 16, 400, sources={"words": Source(str(tmp_path / "set"), modality="text")}, num_streams=1
    )
    batch = next(iter(texts.train_dataloader()))
    assert batch.images_BRYX is None and batch.text_BL is not None
    validation = next(iter(read_set(tmp_path / "set").val_dataloader()))
    assert validation.text_BL is not None
    spelt = [
        ShardStorage(str(tmp_path / "set")).read_tokenizer(manifest.tokenizer).decode(row.tolist())
        for row in validation.text_BL
    ]
    assert all(text.startswith("first of") for text in spelt)


@BOTH
def test_a_missing_field_is_refused(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
    folder = folder_of(tmp_path / "in", *write_captions_to_json())
    with pytest.raises(TooManyBadError, match=r"60 rows are bad.*no field 'caption', only captions, url"):
        convert_it(folder, tmp_path / "set", names=MemberNames(caption_field="caption"))


def test_a_set_with_a_layout_has_another_format(tmp_path: Path) -> None:
    keep(folder_of(tmp_path / "in", *write_captions_to_json()), tmp_path / "set", names=SEVERAL)
    written = json.loads((tmp_path / "set/manifest.json").read_text())
    assert written["format"] == "moevlm-shards/2"
    assert written["layout"] == {"stored_as": {}, "caption_field": "captions", "keys_repeat": False}
    keep(folder_of(tmp_path / "plain", *three_tars()), tmp_path / "plain_set")
    written = json.loads((tmp_path / "plain_set/manifest.json").read_text())
    assert written["format"] == "moevlm-shards/1" and "layout" not in written
