"""Robust z-scores and the quantity that moved first, by hand."""

import math

import pytest

from lightning_moevlm.study.forensics.deviation import find_level, remove_trend, robust_score
from lightning_moevlm.study.forensics.first_moved import find_moved
from lightning_moevlm.tracking.recordings.recording import RecordedStep


def test_the_score_is_in_deviations_of_a_normal_variable() -> None:
    past = [1.0, 2.0, 3.0, 4.0, 100.0]  # median 3, distances 2 1 0 1 97: MAD 1, the outlier does not count
    assert robust_score(3.0 + 1.4826, past) == pytest.approx(1.0)
    assert robust_score(3.0 - 2 * 1.4826, past) == pytest.approx(-2.0)


def test_a_constant_past_has_a_least_spread() -> None:
    assert robust_score(5.0, [2.0] * 9, floor=0.5) == pytest.approx(6.0)
    assert robust_score(2.002, [2.0] * 9) == pytest.approx(1.0)  # 0.001 of the median


def test_a_trend_is_no_move() -> None:
    line = [float(n) for n in range(1, 101)]  # median 50.5, MAD 25: (101 - 50.5) / 37.07
    assert robust_score(101.0, line) == pytest.approx(50.5 / 37.065, rel=1e-3)


def test_what_is_not_finite_is_far_and_does_not_enter_the_past() -> None:
    assert robust_score(math.nan, [1.0]) == math.inf
    assert robust_score(1.0, [math.nan, math.inf]) == 0.0


def test_the_trend_is_the_median_of_the_values_before() -> None:
    assert find_level([1.0, 2.0, 3.0]) is None
    assert find_level([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]) == 4.5  # of the last 8
    assert remove_trend([1.0, 2.0, 3.0, 4.0, 5.0, 9.0]) == [5.0 - 2.5, 9.0 - 3.0]


def steps(num_calm: int, *late: dict[str, float]) -> list[RecordedStep]:
    """Calm steps with loss 2 +- 0.1 and a gradient norm between e^0 and e^0.1, then the given ones."""
    calm = [
        {"loss/text": 2.0 + 0.1 * (n % 2), "gradient_norm/a.b": math.exp(0.1 * (n % 2)), "load/a/text/expert0": 0.5}
        for n in range(num_calm)
    ]
    return [RecordedStep(number, values, {}) for number, values in enumerate([*calm, *late], 1)]


# 80 calm losses, half at 2.0 and half at 2.1: the level is 2.05 and the differences are +-0.05, so MAD is 0.05 and one
# deviation 0.07413. The first four have no level, so there are 76 differences. The threshold is 6 x (1 + 8 / 76), 6.63
# deviations: the loss has moved above 2.05 + 0.4916 = 2.5416.
def test_the_first_quantity_beyond_the_threshold() -> None:
    usual = {"loss/text": 2.0, "gradient_norm/a.b": 1.0}
    early = [usual] * 6 + [{"loss/text": 2.53, "gradient_norm/a.b": 3.0}, {"loss/text": 2.0, "gradient_norm/a.b": 3.0}]
    found = find_moved(steps(80, usual, usual, *early, {"loss/text": 2.55, "gradient_norm/a.b": 3.0}), 91)
    assert [(one.step, one.quantity, one.layer) for one in found] == [
        (89, "gradient_norm/a.b", "a.b"),
        (91, "loss/text", ""),
    ]
    # the logarithm: median 0.05, MAD 0.05, so the spread of 0.07413 is below the floor of 0.1
    assert found[0].score == pytest.approx((math.log(3.0) - 0.05) / 0.1, rel=1e-3)
    assert found[1].score == pytest.approx(0.5 / 0.07413, rel=1e-3)


def test_within_a_step_the_larger_score_is_first_and_sums_do_not_count() -> None:
    values = {"loss/text": 9.0, "gradient_norm/a.b": 3.0, "total_loss": 99.0, "loss_weight/text": 5.0}
    found = find_moved(steps(40, values), 41)
    assert [one.quantity for one in found] == ["loss/text", "gradient_norm/a.b"]


def test_a_load_that_falls_has_moved_down() -> None:
    (found,) = find_moved(steps(40, {"load/a/text/expert0": 0.0}), 41)
    assert found.score == pytest.approx(-0.5 / 0.05) and found.kind == "load"


def test_a_quantity_with_two_past_values_says_nothing() -> None:
    rows = steps(40, {"router_logit/a/text": 1e6, "loss/text": 2.0})
    rows[0].values["router_logit/a/text"] = rows[1].values["router_logit/a/text"] = 1.0  # type: ignore[index]
    assert find_moved(rows, 41) == []


def test_later_steps_are_not_looked_at() -> None:
    assert find_moved(steps(40, {"loss/text": 2.0}, {"loss/text": 99.0}), 41) == []


def test_an_update_that_follows_the_schedule_has_not_moved() -> None:
    rows = [
        RecordedStep(n, {"update_norm/a": 100 * rate, "learning_rate": rate}, {})
        for n, rate in ((n, 1e-3 * 0.7 ** max(0, n - 38)) for n in range(1, 42))
    ]
    assert [one.quantity for one in find_moved(rows, 41)] == []
    rows[-1].values["update_norm/a"] *= 3  # type: ignore[index]
    (found,) = find_moved(rows, 41)
    assert (found.quantity, found.value) == ("update_norm/a", pytest.approx(300.0))
