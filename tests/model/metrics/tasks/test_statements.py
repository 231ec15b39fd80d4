"""Accuracy and consistency of statements against a count by hand."""

import random
from collections import defaultdict

import pytest

from lightning_moevlm.contracts.step_records import Judged, ObjectiveOutput
from lightning_moevlm.model.metrics.tasks.statements import StatementAccuracy


def output(*rows: tuple[bool, bool, str, int]) -> ObjectiveOutput:
    return ObjectiveOutput({}, {}, (), 0, judged=Judged(*map(tuple, zip(*rows, strict=True))))


def test_by_hand() -> None:
    measure = StatementAccuracy()
    measure.update(output((True, True, "both", 1), (True, False, "both", 1), (False, False, "is/not", 2)))
    measure.update(output((True, True, "both", 3), (True, True, "both", 3)))
    assert measure.compute("val").values == {
        "val/statement_accuracy/both": 3 / 4,
        "val/statement_majority/both": 3 / 4,
        "val/statement_accuracy/is_not": 1.0,
        "val/statement_majority/is_not": 1.0,
        "val/statement_accuracy/all": 4 / 5,
        "val/statement_majority/all": 4 / 5,
        "val/statement_consistency": 2 / 3,  # of texts 1, 2, 3
        "val/chance_statement_consistency": pytest.approx((1 / 4 + 1 / 2 + 1 / 4) / 3),
    }
    measure.reset()
    assert measure.compute("val").values == {}


def test_against_a_loop_over_texts() -> None:
    draw = random.Random(0)
    rows = [(draw.random() < 0.6, draw.random() < 0.5, draw.choice("abc"), draw.randrange(40)) for _ in range(200)]
    measure = StatementAccuracy()
    for start in range(0, 200, 7):
        measure.update(output(*rows[start : start + 7]))
    values = measure.compute("test").values
    by_text: dict[int, list[bool]] = defaultdict(list)
    for said, truth, _, text in rows:
        by_text[text].append(said == truth)
    assert values["test/statement_consistency"] == pytest.approx(sum(map(all, by_text.values())) / len(by_text))
    assert values["test/statement_accuracy/all"] == pytest.approx(sum(said == truth for said, truth, *_ in rows) / 200)
