import json
from itertools import islice
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.images.decode import decode_image
from lightning_moevlm.data.text.tokenizer import read_tokenizer
from lightning_moevlm.data.write.demo.drawing_catalogue import first_drawings
from lightning_moevlm.data.write.demo.facts import LETTERS, RELATIONS, build_facts, make_samples
from lightning_moevlm.data.write.demo.scene_graph import GROUNDS
from lightning_moevlm.data.write.shard_writer import Sample

NUM_FACTS = 8 * len(RELATIONS)


def build(root: Path, num_samples: int = 3 * NUM_FACTS, num_relations: int = len(RELATIONS), image_size: int = 32):
    return build_facts(root, num_samples, image_size, "png", 8, num_relations, 0, 256, 320, False)


def make(count: int, seed: int = 0) -> list[Sample]:
    return list(islice(make_samples(count, first_drawings(8), RELATIONS, 32, "png", seed), count))


def test_a_fact_is_the_same_in_every_image_and_differs_between_words() -> None:
    samples = make(2 * NUM_FACTS)
    facts = {}
    for sample in samples:
        about = json.loads(sample.annotation)
        assert sample.caption == f"{about['name']} {about['relation']} {about['answer']}"
        assert len(about["answer"].split()) == 4 and set(about["answer"].split()) <= set(LETTERS)
        assert facts.setdefault((about["name"], about["relation"]), about["answer"]) == about["answer"]
    assert len(facts) == NUM_FACTS
    # 64 draws of 65,536: one pair alike in 32 builds; in this one none
    assert len(set(facts.values())) == NUM_FACTS
    assert len({sample.image for sample in samples}) == len(samples)  # each on its own ground, place and size
    assert len({sample.key for sample in samples}) == len({sample.identity for sample in samples}) == len(samples)


def test_the_drawing_lies_in_its_box_on_its_ground() -> None:
    for sample in make(6):
        about = json.loads(sample.annotation)
        image_RYX = decode_image(sample.image, "image", 32)
        left, top, right, bottom = about["box"]
        is_ground_YX = (image_RYX.permute(1, 2, 0) == image_RYX.new_tensor(GROUNDS[about["ground"]])).all(dim=-1)
        assert not is_ground_YX[top:bottom, left:right].all()
        is_ground_YX[top:bottom, left:right] = True
        assert is_ground_YX.all()


def test_a_larger_set_begins_with_the_smaller_and_another_seed_has_other_facts() -> None:
    assert make(20)[:5] == make(5)
    assert [one.caption for one in make(20)] != [one.caption for one in make(20, seed=1)]


def test_letters_and_relations_are_tokens_of_their_own(tmp_path: Path) -> None:
    """So that a fact costs as many predictions as it has letters."""
    manifest, built = build(tmp_path / "set")
    assert built and not build(tmp_path / "set")[1]
    assert manifest.num_samples("train") > 2 * NUM_FACTS > 6 * manifest.num_samples("val") > 0
    text = read_tokenizer(tmp_path / "set/tokenizer.json").encode(["star owner a c d f"], 16)
    assert int(text.text_mask_BL.sum()) == 8  # [BOS], six words and [EOS]


@pytest.mark.parametrize("given", [{"num_relations": 9}, {"num_relations": 0}, {"image_size": 16}, {"num_samples": 0}])
def test_what_is_out_of_range_is_refused(given: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{next(iter(given))} is {next(iter(given.values()))}"):
        build(tmp_path / "set", **given)
    assert not (tmp_path / "set").exists()
