"""Scores of captions: by hand where that is short, and at their ends."""

import math

import pytest

from lightning_moevlm.model.metrics.tasks.caption_scores import score_captions


def test_a_caption_that_someone_wrote_scores_1() -> None:
    references = {"a": ["a red car left of a dog", "A car, and a dog!"], "b": ["two blue balls on a white ground"]}
    found = score_captions({"a": "A red car left of a dog.", "b": "two blue balls on a white ground"}, references)
    assert {name: found[name] for name in ("bleu4", "rouge_l", "chrf")} == pytest.approx(
        {"bleu4": 1.0, "rouge_l": 1.0, "chrf": 1.0}
    )


def test_bleu_and_rouge_by_hand() -> None:
    # 5 words of 6; 1-grams 5/5, 2-grams 3/4, 3-grams 2/3, 4-grams 1/2; brevity exp(1 - 6/5)
    found = score_captions({"a": "one two three four six"}, {"a": ["one two three four five six"]})
    precision = (1.0 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert found["bleu4"] == pytest.approx(math.exp(1 - 6 / 5) * precision, rel=1e-4)
    precision_l, recall_l = 5 / 5, 5 / 6  # longest common subsequence: all five
    assert found["rouge_l"] == pytest.approx(2 * precision_l * recall_l / (precision_l + recall_l), rel=1e-4)


def test_the_best_reference_counts() -> None:
    references = ["nothing alike here", "a red car on a road"]
    alone = score_captions({"a": "a red car"}, {"a": references[1:]})["rouge_l"]
    assert score_captions({"a": "a red car"}, {"a": references})["rouge_l"] == pytest.approx(alone)


def test_nothing_in_common_scores_0() -> None:
    found = score_captions({"a": "xx yy", "b": ""}, {"a": ["dog"], "b": ["cat"]})
    assert {name: found[name] for name in ("bleu4", "rouge_l", "chrf")} == {"bleu4": 0.0, "rouge_l": 0.0, "chrf": 0.0}


def test_cider_prefers_the_words_of_the_image() -> None:
    pytest.importorskip("pycocoevalcap")
    references = {"a": ["a red car"], "b": ["a blue dog"], "c": ["a green hat"]}
    right = {image: texts[0] for image, texts in references.items()}
    swapped = {"a": "a blue dog", "b": "a green hat", "c": "a red car"}
    scores = [score_captions(predicted, references)["cider"] for predicted in (right, swapped)]
    assert scores[0] > 5 and scores[1] < 0.5
