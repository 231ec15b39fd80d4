"""Replays are judged by one loss and one past; answers and proofs, by hand."""

import math

import pytest

from lightning_moevlm.study.forensics.replay.answer import Verdict, answer, count_spoilt
from lightning_moevlm.study.forensics.replay.course import Course, judge_replay
from lightning_moevlm.study.forensics.replay.proof import compare_points, compare_recordings, equal_steps
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.recordings.recording import Event, RecordedStep

CALM = [1.9, 2.0, 2.1, 2.0] * 5  # steps 1 to 20
LEVEL = 2.0  # of step 22: the median of the last 8
DEVIATION = 1.4826 * 0.1  # with 1.9 in step 21, of the 17 differences from the level 9 are 0.1 in size


def step(number: int, loss: float, **more: float) -> RecordedStep:
    values = {"loss/text": loss, "loss_weight/text": 1.0, "total_loss": loss}
    return RecordedStep(number, values | {name.replace("__", "/"): value for name, value in more.items()}, {"": ("a",)})


PAST = [step(number, loss) for number, loss in enumerate(CALM, 1)]


def course(*losses: float, recorded: tuple[Event, ...] = (), **more: float) -> Course:
    """Judge steps 21 and on."""
    steps = [step(number, loss, **more) for number, loss in enumerate(losses, 21)]
    reference = [step(number, 2.0) for number in range(21, 21 + len(losses))]
    return judge_replay(PAST, steps, recorded, reference, threshold=6.0)


def test_the_past_of_the_run_stands_before_the_replay() -> None:
    found = course(1.9, LEVEL + 6.1 * DEVIATION, 2.0)
    assert [(event.step, event.kind) for event in found.events] == [(22, "spike")]
    assert [one.is_spoilt for one in found.steps] == [False, True, False]
    at = found.at(22)
    assert at is not None and at.score == pytest.approx(6.1)
    assert course(1.9, LEVEL + 5.9 * DEVIATION).events == ()


def test_a_loss_term_that_a_change_adds_does_not_count() -> None:
    found = course(2.0, 2.0, loss__router_z=50.0, loss_weight__router_z=1.0, total_loss=52.0)
    assert [one.loss for one in found.steps] == [2.0, 2.0] and found.events == ()
    found = course(2.0, 2.0, loss__router_z=math.nan, loss_weight__router_z=1.0)
    assert [(event.step, event.kind) for event in found.events] == [(21, "not finite")]


def test_weights_are_those_of_the_run() -> None:
    assert [one.loss for one in course(2.0, 2.1, loss_weight__text=0.5).steps] == [2.0, 2.1]


def test_a_term_that_a_change_removes_is_taken_from_the_past_too() -> None:
    past = [each._replace(values={**each.values, "loss/z": 7.0, "loss_weight/z": 1.0}) for each in PAST]
    steps = [step(21, 2.0), step(22, 3.0)]
    found = judge_replay(past, steps, (), past, threshold=6.0)
    assert [one.loss for one in found.steps] == [2.0, 3.0]
    assert [(event.step, event.kind) for event in found.events] == [(22, "spike")]


def test_events_that_the_rule_does_not_know_come_from_the_recording() -> None:
    crash = Event(23, "exception", "RuntimeError: out of memory")
    found = course(2.0, 9.0, recorded=(crash, Event(22, "spike", "of the recorder, which had no past")))
    assert [(event.step, event.kind) for event in found.events] == [(22, "spike"), (23, "exception")]
    assert "deviations above its past" in found.events[0].detail


UNCHANGED = course(2.0, 9.0, 9.0, 2.0, 2.0)


@pytest.mark.parametrize(
    "arm, verdict, words",
    [
        (course(1.9, 2.05, 2.0, 2.0, 2.0), Verdict.PREVENTS, "the loss of step 22 is 2.05, +0.3 deviations"),
        (course(2.0, 8.0, 2.0, 2.0, 2.0), Verdict.DOES_NOT, "in 1 steps (unchanged: 2)"),
        (course(2.0, 2.0, 9.0, 2.0, 2.0), Verdict.MOVES, "at step 23 instead"),
        (course(9.0, 2.0, 2.0, 2.0, 2.0), Verdict.MOVES, "at step 21 instead"),
        (course(2.0), Verdict.DOES_NOT, "it ends at step 21"),
    ],
)
def test_answers(arm: Course, verdict: Verdict, words: str) -> None:
    found = answer("x=1", 22, arm, UNCHANGED, is_equal=False)
    assert found.verdict is verdict and words in found.sentence and found.sentence.startswith(f"x=1 {verdict}")


def test_an_idle_change_and_a_step_without_an_event() -> None:
    assert answer("x=1", 22, UNCHANGED, UNCHANGED, is_equal=True).verdict is Verdict.CHANGES_NOTHING
    assert answer("x=1", 24, UNCHANGED, UNCHANGED, is_equal=False).verdict is Verdict.NO_EVENT
    cut = UNCHANGED._replace(steps=UNCHANGED.steps[:1])
    assert answer("x=1", 24, cut, UNCHANGED, is_equal=False).sentence.endswith(
        f"at step 24; but it ends at step {cut.steps[0].step}, before the unchanged replay does."
    )
    assert count_spoilt(UNCHANGED, 22) == 2


def test_a_later_event_that_stays_is_named() -> None:
    unchanged = course(2.0, 9.0, 2.0, 9.0)
    found = answer("x=1", 22, course(2.0, 2.0, 2.0, 9.0), unchanged, is_equal=False)
    assert found.verdict is Verdict.PREVENTS and "the spike at step 24 stays" in found.sentence


def test_the_first_value_that_differs_is_named() -> None:
    run = {number: step(number, 2.0, gradient_norm__a=1.0) for number in range(18, 26)}
    replay = [step(number, 2.0, gradient_norm__a=1.0) for number in range(21, 24)]
    proof = compare_recordings(run, replay, after=20)
    assert proof.holds and (proof.num_steps, proof.num_values) == (3, 12)
    replay[1] = step(22, 2.0, gradient_norm__a=1.0000001)
    proof = compare_recordings(run, replay, after=20)
    assert not proof.holds and proof.first is not None
    assert (proof.first.step, proof.first.quantity, proof.first.replay) == (22, "gradient_norm/a", "1.0000001")
    replay[0] = replay[0]._replace(keys={"": ("b",)})
    assert compare_recordings(run, replay, after=20).first == (21, "samples", "a", "b")
    assert not compare_recordings({}, replay, after=20).holds


def test_nan_equals_nan_and_the_first_change_of_weights_is_left_out() -> None:
    run = {number: step(number, math.nan, update_norm__a=1.0) for number in (21, 22)}
    replay = [step(21, math.nan, update_norm__a=0.5), step(22, math.nan, update_norm__a=1.0)]
    assert compare_recordings(run, replay, after=20).holds
    assert not compare_recordings(run, replay, after=19).holds
    assert equal_steps(replay, replay, after=20) and not equal_steps(replay, replay[:1], after=20)


def test_logged_metrics_are_compared_where_both_have_them() -> None:
    run = [Point("train/task_loss", at, 2.0, 0) for at in (20, 30)] + [Point("throughput/samples", 30, 5.0, 0)]
    replay = [Point("train/task_loss", 30, 2.0, 0), Point("throughput/samples", 30, 9.0, 0)]
    assert compare_points(run, replay, after=25) == (1, 1, None, "MLflow")
    proof = compare_points(run, [Point("train/task_loss", 30, 2.5, 0)], after=25)
    assert proof.first == (30, "train/task_loss", "2", "2.5")
    assert not compare_points(run, replay, after=30).holds
