"""VQA accuracy by hand, and the constant answers that it is compared with."""

import pytest
import torch

from lightning_moevlm.contracts.step_records import Answered
from lightning_moevlm.model.metrics.tasks.vqa import VQAAccuracy, normalise_answer, vqa_accuracy
from tests.small_model import default_dtype


@pytest.mark.parametrize(
    ("num_agreeing", "score"),
    # of ten people n agree: n of the ten leave-one-out sets hold n - 1 of them, the others n
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_ten_answers_score_as_published(num_agreeing: int, score: float) -> None:
    given = ["red"] * num_agreeing + [f"other {n}" for n in range(10 - num_agreeing)]
    assert vqa_accuracy("red", given) == pytest.approx(score)


def test_a_single_answer_must_be_matched() -> None:
    assert (vqa_accuracy("two", ["2"]), vqa_accuracy("three", ["2"])) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Dog", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("don't know", "dont know"),
        ("1,000", "1000"),
        ("ice-cream!", "ice cream"),
        ("  a   red  car. ", "red car"),
    ],
)
def test_answers_that_count_as_equal(one: str, other: str) -> None:
    assert normalise_answer(one) == normalise_answer(other)


@pytest.mark.parametrize(("one", "other"), [("1.5", "15"), ("dog", "dogs"), ("no", "none"), ("left", "right")])
def test_answers_that_count_as_different(one: str, other: str) -> None:
    assert normalise_answer(one) != normalise_answer(other)


def test_means_are_over_questions_by_kind_and_beside_the_best_constant_answer() -> None:
    metric = VQAAccuracy()
    metric.add(Answered(("yes", "no"), (("yes",), ("yes",)), ("is", "is")))
    metric.add(Answered(("no", "2", "red"), (("no",), ("2",), ()), ("is", "count", "is")))
    found = metric.scores()
    # is: yes right, no wrong, no right; the best constant, yes, is right twice; one question has no answers
    assert found["is"].accuracy == pytest.approx(2 / 3) and found["is"].majority == pytest.approx(2 / 3)
    assert found["count"].accuracy == found["count"].majority == 1.0
    assert found["all"].accuracy == pytest.approx(3 / 4) and found["all"].majority == pytest.approx(3 / 4)
    metric.reset()
    assert metric.scores() == {}


def test_scores_are_fp32_under_bf16_true() -> None:
    metric = VQAAccuracy()
    with default_dtype(torch.bfloat16):
        metric.add(Answered(("red",), (("red", *["blue"] * 9),), ("colour",)))
    assert metric.scores()["colour"].accuracy == pytest.approx(0.3, abs=1e-6)
