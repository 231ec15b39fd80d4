"""What is known of tokens: objects in patches and words, words of tokens, colours, word classes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_moevlm.atlas.labels.label import MOST_VALUES, OTHER, UNKNOWN, Values
from lightning_moevlm.atlas.labels.pixels import name_colours
from lightning_moevlm.atlas.labels.scene_objects import (
    ModelView,
    SceneObject,
    objects_of_patches,
    objects_of_words,
    read_objects,
)
from lightning_moevlm.atlas.labels.words import find_tagger, find_words
from lightning_moevlm.contracts.special_tokens import BOS, EOS
from lightning_moevlm.data.write.demo.drawing_catalogue import DRAWINGS
from tests.atlas.observed import open_data

APPLE = SceneObject("red apple", "fruit", "red", ((0, 0, 16, 16),))
CAT = SceneObject("cat face", "animal", "orange", ((20, 18, 32, 32),))


def test_objects_of_patches_by_hand() -> None:
    # 32 px in 4 patches of 16: the apple fills the first; the cat covers 12 x 14 px of the last, and 12 x 0 elsewhere
    view = ModelView(32, 2)
    assert objects_of_patches((APPLE, CAT), view, (32, 32)) == [0, None, None, 1]
    # stored twice as large
    large = SceneObject("red apple", boxes=((0, 0, 32, 32),))
    assert objects_of_patches((large,), view, (64, 64)) == [0, None, None, None]
    # 96 x 32: the model sees columns 32 to 64; the left end of the box lies outside
    wide = SceneObject("red apple", boxes=((0, 0, 48, 16),))
    assert view.cover(wide.boxes[0], (96, 32)) == pytest.approx([1, 0, 0, 0])
    assert objects_of_patches((), view, (32, 32)) == [None] * 4


def test_every_name_is_found_in_singular_and_plural() -> None:
    for drawing in DRAWINGS:
        for name in (drawing.name, drawing.plural):
            words = f"two {name} left of a thing".split()
            named = objects_of_words((SceneObject(drawing.name),), words)
            assert named == [None, *[0] * len(name.split()), *[None] * 4], name


def test_objects_of_another_form_are_none() -> None:
    assert read_objects({"objects": ["apple"]}) == read_objects({"objects": None}) == read_objects({}) == ()
    assert read_objects({"objects": [{"name": "star", "boxes": [[1, 2, 3, 4]], "more": 1}]}) == (
        SceneObject("star", boxes=((1, 2, 3, 4),)),
    )


def test_tokens_belong_to_words(many_scenes: Path) -> None:
    tokenizer = open_data(many_scenes).tokenizer
    text = "Two umbrellas, left of a zyzzyva"
    ids = [BOS, *tokenizer.ids(text), EOS, *tokenizer.ids("yes"), EOS]
    found = find_words(text, ids, tokenizer)
    assert found.words == ("two", "umbrellas", "left", "of", "a", "zyzzyva")
    assert len(found.tokens) == len(ids) and found.tokens[0] == "[BOS]" and found.tokens[-1] == "[EOS]"
    of_words = [number for number in found.of_token if number is not None]
    assert of_words == sorted(of_words) and set(of_words) == set(range(6))
    assert found.of_token.count(5) > 1  # no token of its own
    end = ids.index(EOS)
    assert all(number is None for number in found.of_token[end:]) and found.tokens[end + 1] != "zyzzyva"


def test_colours_are_named() -> None:
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[0, :, :4, 4:] = torch.tensor([250, 220, 40]).view(3, 1, 1)
    images[0, :, 4:, :4] = torch.tensor([255, 190, 205]).view(3, 1, 1)
    images[0, :, 4:, 4:] = 255
    assert name_colours(images, 2) == [["black", "yellow", "pink", "white"]]


def test_values_beyond_the_most_share_one() -> None:
    values = Values()
    codes = values.codes([None, *map(str, range(MOST_VALUES + 5))])
    assert codes[0] == UNKNOWN and len(values.names) == MOST_VALUES and values.names[-1] == OTHER
    assert len(set(codes[-6:])) == 1 and codes[1:4] == [0, 1, 2]


def test_word_classes_come_from_an_installed_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doc(list[SimpleNamespace]):
        def __init__(self, vocab: object, words: list[str]) -> None:
            super().__init__(SimpleNamespace(pos_="NOUN" if word == "star" else "X") for word in words)

    class Pipeline:
        vocab, meta = object(), {"version": "3.8.0"}

        def __call__(self, doc: Doc) -> Doc:
            return doc

    installed: list[str] = []
    spacy = SimpleNamespace(
        __spec__=object(), __version__="3.8.16", load=lambda name, exclude: Pipeline(), tokens=SimpleNamespace(Doc=Doc),
        util=SimpleNamespace(get_installed_models=lambda: installed),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    assert find_tagger() is None  # a library without a pipeline
    installed.append("en_core_web_sm")
    tagger = find_tagger()
    assert tagger is not None and tagger.name == "spaCy 3.8.16, en_core_web_sm 3.8.0"
    assert tagger.tag(["a", "star"]) == ["X", "NOUN"] and tagger.tag([]) == []
    assert np.array(tagger.tag(["star"])).tolist() == ["NOUN"]
