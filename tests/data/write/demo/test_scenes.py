"""Sentences on scenes, compared with boxes and pixels by code that shares nothing with the writer's."""

import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.write.demo.drawing_catalogue import DRAWINGS, Drawing, first_drawings
from lightning_moevlm.data.write.demo.openmoji_art import rasterise
from lightning_moevlm.data.write.demo.scene_graph import GROUNDS, Box, Group, Scene, salient_relation
from lightning_moevlm.data.write.demo.scene_language import caption
from lightning_moevlm.data.write.demo.scenes import Painter, build_scenes, make_sample
from lightning_moevlm.data.write.shard_writer import Sample
from tests.data.one_type import types_by_field

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
BY_NAME = {p.name: p for p in DRAWINGS} | {p.plural: p for p in DRAWINGS}
SIZE = 64


@pytest.fixture(scope="module")
def samples() -> list[tuple[Sample, dict, np.ndarray]]:
    """200 scenes as PNG: the sample, its annotation, its pixels."""
    world, painter = first_drawings(64), Painter(SIZE)
    made = []
    for index in range(200):
        sample = make_sample(index, world, painter, "png", seed=5)
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"))
        made.append((sample, json.loads(sample.annotation), pixels))
    return made


def _stands(one: list[list[int]], relation: str, other: list[list[int]]) -> bool:
    """Every box of one against every box of the other; a box is left, top, right, bottom."""
    clear = {
        "left of": lambda a, b: a[2] <= b[0],
        "right of": lambda a, b: a[0] >= b[2],
        "above": lambda a, b: a[3] <= b[1],
        "below": lambda a, b: a[1] >= b[3],
    }[relation]
    return all(clear(a, b) for a in one for b in other)


def _boxes(annotation: dict) -> dict[str, list[list[int]]]:
    return {entry["name"]: entry["boxes"] for entry in annotation["objects"]}


def _parse(phrase: str) -> tuple[str, int]:
    number, noun = phrase.split(" ", 1)
    return BY_NAME[noun].name, NUMBERS[number]


def test_captions_are_true_of_the_boxes(samples: list[tuple[Sample, dict, np.ndarray]]) -> None:
    relations = Counter()
    for sample, annotation, _ in samples:
        boxes = _boxes(annotation)
        body, ground = re.fullmatch(r"(.*?),? on an? (\w+) ground", sample.caption).groups()  # type: ignore[union-attr]
        assert ground == annotation["ground"]
        parts = re.split(r",? (left of|right of|above|below|with) ", body)
        first, count = _parse(parts[0])
        mentioned = {first: count}
        for relation, phrases in zip(parts[1::2], parts[2::2], strict=True):
            for phrase in re.split(", | and ", phrases):
                name, count = _parse(phrase)
                mentioned[name] = count
                relations[relation] += 1
                if relation == "with":
                    assert not any(_stands(boxes[first], r, boxes[name]) for r in ("left of", "above"))
                else:
                    assert _stands(boxes[first], relation, boxes[name]), sample.caption
        assert mentioned == {name: len(found) for name, found in boxes.items()}, sample.caption
    assert all(relations[relation] > 10 for relation in ("left of", "right of", "above", "below")), relations


def test_drawings_lie_in_their_boxes_on_the_stated_ground(
    samples: list[tuple[Sample, dict, np.ndarray]],
) -> None:
    for _, annotation, pixels in samples:
        ground = np.array(GROUNDS[annotation["ground"]])
        painted = (pixels != ground).any(-1)
        covered = np.zeros_like(painted)
        for entry in annotation["objects"]:
            assert entry["count"] == len(entry["boxes"])
            for left, top, right, bottom in entry["boxes"]:
                assert 0 <= left < right <= SIZE
                assert 0 <= top < bottom <= SIZE
                assert not covered[top:bottom, left:right].any(), "boxes overlap"
                covered[top:bottom, left:right] = True
                inside = painted[top:bottom, left:right]
                # tight: each side of the box is touched by paint
                assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        assert not painted[~covered].any()
        values, counts = np.unique(pixels[~covered], axis=0, return_counts=True)
        assert values[counts.argmax()].tolist() == ground.tolist()


def test_one_to_four_drawings(samples: list[tuple[Sample, dict, np.ndarray]]) -> None:
    totals = Counter(sum(entry["count"] for entry in annotation["objects"]) for _, annotation, _ in samples)
    assert set(totals) == {1, 2, 3, 4}


def test_answers_are_right(samples: list[tuple[Sample, dict, np.ndarray]]) -> None:
    kinds, answers = Counter(), Counter()
    for _, annotation, _ in samples:
        boxes, objects = _boxes(annotation), {entry["name"]: entry for entry in annotation["objects"]}
        assert len(annotation["questions"]) >= 3
        assert len({entry["kind"] for entry in annotation["questions"]}) >= 3
        for entry in annotation["questions"]:
            kinds[entry["kind"]] += 1
            answers[entry["kind"], entry["answer"]] += 1
            assert entry["answer"] == _answer(entry["question"], boxes, objects, annotation["ground"]), entry
    assert min(kinds[kind] for kind in ("existence", "count", "colour", "category", "relation")) >= 80
    yes, no = answers["relation", "yes"], answers["relation", "no"]
    assert 0.35 < yes / (yes + no) < 0.65
    assert answers["existence", "yes"] == answers["existence", "no"]


def _answer(question: str, boxes: dict[str, list[list[int]]], objects: dict[str, dict], ground: str) -> str:
    if found := re.fullmatch(r"is there an? (.+)\?", question):
        return "yes" if found[1] in boxes else "no"
    if found := re.fullmatch(r"how many (.+) are there\?", question):
        return ["no", "one", "two", "three", "four"][len(boxes[BY_NAME[found[1]].name])]
    if question == "what colour is the ground?":
        return ground
    if found := re.fullmatch(r"what (colour|kind of thing) (?:is|are) the (.+)\?", question):
        return str(objects[BY_NAME[found[2]].name]["colour" if found[1] == "colour" else "category"])
    if found := re.fullmatch(r"(?:is|are) the (.+) (left of|right of|above|below) the (.+)\?", question):
        one, other = (boxes[BY_NAME[found[i]].name] for i in (1, 3))
        return "yes" if _stands(one, found[2], other) else "no"
    found = re.fullmatch(r"what is (left of|right of|above|below) the (.+)\?", question)
    assert found, question
    other = BY_NAME[found[2]].name
    (name,) = [n for n in boxes if n != other and _stands(boxes[n], found[1], boxes[other])]
    return name


def test_statements_have_the_truth_they_claim(samples: list[tuple[Sample, dict, np.ndarray]]) -> None:
    for _, annotation, _ in samples:
        boxes = _boxes(annotation)
        truths = Counter(entry["truth"] for entry in annotation["statements"])
        assert truths[True] == truths[False] >= 3
        for entry in annotation["statements"]:
            assert entry["truth"] == _truth(entry["text"], boxes, annotation["ground"]), entry


def _truth(text: str, boxes: dict[str, list[list[int]]], ground: str) -> bool:
    if found := re.fullmatch(r"there (?:is|are) exactly (one|two|three|four) (.+)", text):
        name = BY_NAME[found[2]].name
        return len(boxes.get(name, [])) == {"one": 1, "two": 2, "three": 3, "four": 4}[found[1]]
    if found := re.fullmatch(r"there is no (.+)", text):
        return found[1] not in boxes
    if found := re.fullmatch(r"there is an? (.+)", text):
        return found[1] in boxes
    if found := re.fullmatch(r"the ground is (\w+)", text):
        return found[1] == ground
    found = re.fullmatch(r"the (.+) (?:is|are) (left of|right of|above|below) the (.+)", text)
    assert found, text
    return _stands(boxes[BY_NAME[found[1]].name], found[2], boxes[BY_NAME[found[3]].name])


def test_relations_of_the_graph_are_complete(samples: list[tuple[Sample, dict, np.ndarray]]) -> None:
    for _, annotation, _ in samples:
        objects = annotation["objects"]
        expected = {
            (i, relation, j)
            for i in range(len(objects))
            for j in range(len(objects))
            for relation in ("left of", "right of", "above", "below")
            if i != j and _stands(objects[i]["boxes"], relation, objects[j]["boxes"])
        }
        assert {(fact["subject"], fact["relation"], fact["object"]) for fact in annotation["relations"]} == expected


def test_every_field_of_the_json_has_one_type(samples: list[tuple[Sample, dict, np.ndarray]]) -> None:
    types = types_by_field(annotation for _, annotation, _ in samples)
    assert {field: kinds for field, kinds in types.items() if len(kinds) > 1} == {}
    assert types[".relations[].relation"] == {"str"} and types[".relations[].subject"] == {"int"}
    assert types[".objects[].boxes[][]"] == {"int"}


def test_caption_by_hand() -> None:
    apple, cat, star = (BY_NAME[name] for name in ("red apple", "cat face", "star"))
    scene = Scene(
        "blue",
        (
            Group(apple, (Box(0, 0, 10, 10),)),
            Group(cat, (Box(20, 0, 30, 10),)),
            Group(star, (Box(0, 20, 10, 30), Box(20, 20, 30, 30))),
        ),
    )
    assert caption(scene) == "a red apple left of a cat face, above two stars, on a blue ground"
    # between apple and star 40 pixels down, 10 across: a person says "above"
    assert salient_relation(Group(apple, (Box(0, 0, 10, 10),)), Group(star, (Box(10, 40, 20, 50),))) == "above"
    # overlapping in both directions: nothing is said
    assert salient_relation(Group(apple, (Box(0, 0, 10, 10),)), Group(star, (Box(5, 5, 15, 15),))) is None


def _nearest_colour(pixel: np.ndarray) -> str:
    """Name of an art colour: OpenMoji paints from one palette (light and dark tone of each colour)."""
    palette = {
        "red": ((234, 90, 71), (210, 47, 39)),
        "orange": ((244, 170, 65), (226, 112, 34)),
        "yellow": ((252, 234, 43), (241, 179, 28)),
        "green": ((177, 204, 51), (92, 158, 49)),
        "blue": ((146, 211, 245), (97, 178, 228)),
        "purple": ((179, 153, 200), (137, 103, 170)),
        "pink": ((255, 167, 192), (230, 122, 148)),
        "brown": ((165, 121, 57), (106, 70, 42)),
        "grey": ((208, 207, 206), (155, 155, 154)),
        "white": ((255, 255, 255),),
        "black": ((0, 0, 0), (63, 63, 63)),
    }
    distances = {name: min(np.abs(pixel - np.array(tone)).sum() for tone in tones) for name, tones in palette.items()}
    return min(distances, key=lambda name: distances[name])


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda p: p.name)
def test_stated_colours_are_painted(drawing: Drawing) -> None:
    rgba = rasterise(drawing.code, 48).astype(int)
    solid = rgba[rgba[..., 3] > 250][:, :3]
    names: Counter[str] = Counter()
    for colour, count in zip(*np.unique(solid, axis=0, return_counts=True), strict=True):
        names[_nearest_colour(colour)] += int(count)
    del names["black"]  # outlines
    if drawing.colour is not None:
        assert drawing.colour in [name for name, _ in names.most_common(1)], names
    for word in drawing.name.split():
        if word in ("red", "green", "blue", "yellow"):
            assert drawing.colour == word


def test_drawings_are_distinct() -> None:
    assert len({p.code for p in DRAWINGS}) == len({p.name for p in DRAWINGS}) == len(DRAWINGS) == 84
    names = Counter(name for p in DRAWINGS for name in {p.name, p.plural})
    assert max(names.values()) == 1
    for bad in (7, 85):
        with pytest.raises(UserError, match="8 to 84"):
            first_drawings(bad)


def test_a_larger_set_begins_with_the_smaller(samples: list[tuple[Sample, dict, np.ndarray]]) -> None:
    world = first_drawings(64)
    again = [make_sample(i, world, Painter(SIZE), "png", seed=5) for i in (0, 7, 150)]
    assert again == [samples[i][0] for i in (0, 7, 150)]
    assert make_sample(0, world, Painter(SIZE), "png", seed=6).caption != samples[0][0].caption or (
        make_sample(0, world, Painter(SIZE), "png", seed=6).image != samples[0][0].image
    )


def _build(root: Path, seed: int = 3, force: bool = False, num_samples: int = 60) -> bool:
    return build_scenes(root, num_samples, 32, "jpg", 16, seed, 16, 400, force)[1]


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    assert _build(tmp_path / "a") and _build(tmp_path / "b")
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    assert {"manifest.json", "tokenizer.json", "LICENCE.txt", "train-000000.tar"} <= set(files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # no building folder is left


def test_building_again(tmp_path: Path) -> None:
    root = tmp_path / "set"
    assert _build(root)
    before = (root / "manifest.json").read_bytes()
    assert not _build(root)
    with pytest.raises(UserError, match=r"seed 3 there, 4 asked.*--force true"):
        _build(root, seed=4)
    assert (root / "manifest.json").read_bytes() == before
    assert _build(root, seed=4, force=True)
    assert (root / "manifest.json").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_building_over_something_else_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a set of shards"):
        _build(tmp_path, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_existing_set_with_a_broken_shard_is_not_called_built(tmp_path: Path) -> None:
    root = tmp_path / "set"
    _build(root)
    shard = root / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"):
        _build(root)


def test_too_few_samples_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_samples \d+ leaves the \w+ split empty: raise it"):
        _build(tmp_path / "set", num_samples=2)
    assert list(tmp_path.iterdir()) == []
