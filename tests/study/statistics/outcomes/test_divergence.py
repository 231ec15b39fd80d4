"""When a run counts as diverged, in the middle and at the end."""

import math
from pathlib import Path

import pytest

from lightning_moevlm.study.declare.comparison import Divergence
from lightning_moevlm.study.run.ledger import Status, read_ledger
from lightning_moevlm.study.statistics.outcomes.divergence import (
    NONFINITE_STEP,
    explain_divergence,
    explain_early_divergence,
)
from lightning_moevlm.tracking.point import Point
from tests.study.tiny_study import sweep, write_project

LOSS = "val/task_loss"


def points(*values: float) -> list[Point]:
    return [Point(LOSS, 10 * place, value, 0) for place, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "in_a_row", "early"),
    [
        ((4.0, 5.0, 6.0, 3.0), 2, f"{LOSS} is 6 at step 20, for 2 points in a row above 1 x 4 of the untrained model"),
        ((4.0, 5.0, 3.0, 6.0), 2, ""),  # never two in a row; it ended above
        ((4.0, 5.0, 3.0), 1, f"{LOSS} is 5 at step 10, for 1 points in a row above 1 x 4 of the untrained model"),
        ((4.0, 5.0, 6.0, 7.0), None, ""),
        ((4.0, math.nan), None, f"{LOSS} is nan at step 10"),
        ((4.0, 4.0, 4.0), 1, ""),  # not above
        ((), 1, ""),
    ],
)
def test_divergences_found_during_training(values: tuple[float, ...], in_a_row: int | None, early: str) -> None:
    rule = Divergence(LOSS, times_untrained=1.0, in_a_row=in_a_row)
    assert explain_early_divergence(points(*values), rule) == early
    # What was told in the middle is what is told at the end: a run is not stopped for what would not count.
    at_end = explain_divergence(points(*values), rule)
    assert at_end == early or not early
    assert bool(at_end) == (bool(early) or (len(values) > 1 and values[-1] > values[0]))


def test_the_guard_has_the_first_word() -> None:
    rule = Divergence(LOSS, 1.0)
    assert explain_early_divergence([*points(4.0, 3.0), Point(NONFINITE_STEP, 30, 27.0, 0)], rule) == (
        "the training loss was not finite at step 27"
    )


def test_without_the_untrained_model_nothing_is_above_it() -> None:
    # First validated at step 500: it learnt from 2.0 on and overfitted since. That is no divergence.
    late = [Point(LOSS, 500 * (1 + place), value, 0) for place, value in enumerate((2.0, 1.9, 2.1, 2.2))]
    rule = Divergence(LOSS, times_untrained=1.0, in_a_row=1)
    assert explain_divergence(late, rule) == explain_early_divergence(late, rule) == ""
    assert explain_divergence([*late, Point(LOSS, 3000, math.inf, 0)], rule) == f"{LOSS} is inf at step 3000"
    # The first training loss is logged after a step, and is of the untrained model all the same.
    train = [point._replace(key="train/task_loss") for point in late]
    assert "above 1 x 2 of" in explain_divergence(train, Divergence("train/task_loss", 1.0))


@pytest.mark.slow
def test_a_run_that_has_diverged_is_stopped_in_the_middle(tmp_path: Path, uri: str) -> None:
    arms = {"baseline": None, "high": {"model.worse": 20.0}, "nan": {"model.nan_at": 2}}
    study = {"arms": arms, "seeds": [0], "budget": {"max_steps": 40}, "diverged": {"in_a_row": 3}}
    file = write_project(tmp_path, uri, study, model={"seconds_per_step": 0.25})
    plan, experiment, _, _ = sweep(file, jobs=3)
    states = {run.arm: state for run, state in read_ledger(plan)}
    assert [state.status for state in states.values()] == [Status.FINISHED, Status.DIVERGED, Status.DIVERGED]
    # The first value is 4 + 3 + 0.01 sin(5.5) = 6.993.
    assert "at step 3, for 3 points in a row above 1 x 6.993 of" in states["high"].reason
    assert states["nan"].reason == f"{LOSS} is nan at step 2"
    for arm in ("high", "nan"):
        assert max(point.step for point in experiment.history(str(states[arm].run_id), LOSS)) < 40
