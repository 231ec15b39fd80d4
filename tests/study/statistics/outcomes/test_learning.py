"""When a run that reached its end did not learn, and with which value it counts."""

import math
from dataclasses import replace

import pytest

from lightning_moevlm.study.declare.comparison import DidNotLearn
from lightning_moevlm.study.statistics.outcomes.learning import Learning, judge_learning
from lightning_moevlm.study.statistics.outcomes.survival import cap_failed
from lightning_moevlm.tracking.read.series import Series

LOSS = "val/task_loss"
SHARE = DidNotLearn(LOSS, "lower", "healthy", share_of_healthy=0.8)
STALL = DidNotLearn(LOSS, "lower", "healthy", stalled_steps=200)
CONSTANT = DidNotLearn("val/accuracy_text", "higher", "healthy", no_better_than="val/majority_text")
# conf/quickstart.yaml, 600 steps: 3.66; at a rate of 2e-2 without qk-norm, warm-up, clipping and z-loss: 6.32.
HEALTHY = {LOSS: Series((0, 600), (14.82, 3.66))}


def curve(*values: float, every: int = 100) -> dict[str, Series]:
    return {LOSS: Series(tuple(every * i for i in range(len(values))), values)}


def test_a_run_far_behind_the_healthy_one_did_not_learn() -> None:
    # (14.82 - 6.32) / (14.82 - 3.66) = 0.762: below the untrained model's loss, and sick all the same.
    found = judge_learning({LOSS: Series((0, 600), (14.82, 6.32))}, SHARE, HEALTHY)
    assert found == Learning(
        "val/task_loss ended at 6.32, at 0.76 of the way of healthy from 14.82 to 3.66; 0.8 is asked for"
    )
    # 0.8 of the way is 14.82 - 0.8 x 11.16 = 5.892.
    assert judge_learning(curve(14.82, 5.89), SHARE, HEALTHY) == Learning()
    assert judge_learning(curve(14.82, 5.90), SHARE, HEALTHY).failure
    # The way is the healthy run's: a model that starts low is not asked for a fall as deep.
    assert judge_learning(curve(6.0, 3.7), SHARE, HEALTHY) == Learning()
    assert "at 0.00 of the way" in judge_learning(curve(14.82, 20.0), SHARE, HEALTHY).failure


def test_a_share_of_what_is_not_known_is_not_judged() -> None:
    run = curve(14.82, 6.32)
    assert judge_learning(run, SHARE, None) == Learning(unknown="healthy has no sound result with its seed")
    assert judge_learning(run, SHARE, curve(14.0, 14.5)).unknown == "healthy itself made no progress with its seed"
    late = {LOSS: Series((300, 600), (4.0, 3.66))}
    assert judge_learning(run, SHARE, late).unlogged == "no val/task_loss of the untrained healthy"
    assert judge_learning({}, SHARE, HEALTHY).unlogged == "no val/task_loss"


def test_the_constant_answer_is_to_be_beaten() -> None:
    def run(accuracy: float) -> dict[str, Series]:
        return {"val/accuracy_text": Series((0, 9), (0.0, accuracy)), "val/majority_text": Series((0, 9), (0.15, 0.15))}

    assert judge_learning(run(0.16), CONSTANT) == Learning()
    assert judge_learning(run(0.15), CONSTANT) == Learning(
        "val/accuracy_text ended at 0.15, no better than val/majority_text, 0.15"
    )
    alone = {"val/accuracy_text": run(0.16)["val/accuracy_text"]}
    assert judge_learning(alone, CONSTANT) == Learning(unlogged="no val/majority_text")
    assert judge_learning(run(math.nan), CONSTANT).failure == "val/accuracy_text is nan at its end"


@pytest.mark.parametrize(
    ("values", "failure"),
    [
        ((9.0, 6.0, 5.0, 5.1, 5.0), f"{LOSS} has not been better than 5 in its last 200 steps"),
        ((9.0, 6.0, 5.0, 5.1, 4.9), ""),
        ((9.0, 6.0, 5.0, 4.9, 5.3), ""),  # within the window, not at its end
        ((9.0, 4.0, 5.0, 4.5, 4.2), f"{LOSS} has not been better than 4 in its last 200 steps"),
    ],
)
def test_a_stall_is_no_new_best_value_at_the_end(values: tuple[float, ...], failure: str) -> None:
    assert judge_learning(curve(*values), STALL) == Learning(failure)


def test_a_stall_needs_a_value_before_its_window() -> None:
    assert (
        judge_learning({LOSS: Series((500, 600), (5.0, 4.0))}, STALL).unlogged == f"no {LOSS} before its last 200 steps"
    )
    higher = replace(STALL, direction="higher")
    assert judge_learning(curve(0.1, 0.5, 0.4, 0.3), higher).failure.startswith(f"{LOSS} has not been better than 0.5")


def test_one_rule_that_holds_is_enough() -> None:
    both = replace(SHARE, stalled_steps=100)
    assert judge_learning(curve(9.0, 5.0, 5.2), both, None).failure.endswith("in its last 100 steps")


@pytest.mark.parametrize(
    ("value", "untrained", "direction", "capped"),
    [
        (6.3, 14.8, "lower", 6.3),  # a failed run that learned something keeps what it ended at
        (30.0, 14.8, "lower", 14.8),
        (math.nan, 14.8, "lower", 14.8),
        (math.inf, 14.8, "lower", 14.8),
        (None, 14.8, "lower", 14.8),
        (6.3, None, "lower", 6.3),
        (math.nan, None, "lower", None),
        (0.1, 0.2, "higher", 0.2),
        (0.3, 0.2, "higher", 0.3),
    ],
)
def test_a_failed_run_counts_for_no_worse_than_untrained(value, untrained, direction, capped) -> None:
    assert cap_failed(value, untrained, direction) == capped
