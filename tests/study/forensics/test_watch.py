"""Spikes, losses that are not finite and skipped steps are declared once each."""

import math

import pytest

from lightning_moevlm.study.forensics.watch import STILL_STEPS, Watch
from lightning_moevlm.tracking.recordings.recording import RecordedStep


def judge(losses: list[float], threshold: float | None = 6.0, term: str = "text") -> list[tuple[int, str]]:
    watch = Watch(threshold)
    steps = [
        RecordedStep(number, {"total_loss": loss, f"loss/{term}": loss}, {}) for number, loss in enumerate(losses, 1)
    ]
    return [(event.step, event.kind) for step in steps for event in watch.judge(step).events]


LEAST = 16  # the first four steps have no level before them, and 12 differences from it are needed
CALM = [1.9, 2.0, 2.1, 2.0] * (LEAST // 4)  # the level is always 2.0


def test_a_spike_lies_above_six_deviations() -> None:
    deviations = 1.4826 * 0.05  # half of the values are 2.0 and half are 0.1 away, so MAD is 0.05
    assert judge([*CALM, 2.0 + 6.1 * deviations]) == [(LEAST + 1, "spike")]
    assert judge([*CALM, 2.0 + 5.9 * deviations]) == []
    assert judge([*CALM, 2.0 + 6.1 * deviations], threshold=None) == []
    assert judge([*CALM, 2.0 - 50 * deviations]) == []  # a better loss is no spike


def test_a_steep_fall_hides_no_spike() -> None:
    """From 20 down by 0.5 a step, with 0.1 of noise: without the trend 12.0 lies within the past."""
    falling = [20.0 - 0.5 * step + 0.1 * (step % 2) for step in range(24)]
    assert judge([*falling, 12.0]) == [(25, "spike")]
    assert judge([*falling, 8.0]) == []


def test_few_steps_are_not_judged() -> None:
    assert judge([*CALM[: LEAST - 1], 90.0]) == []


def test_every_step_of_a_spike_has_its_kind_and_its_score() -> None:
    watch = Watch(6.0)
    losses = [*CALM, 9.0, 9.0, 2.0]
    found = [
        watch.judge(RecordedStep(step, {"total_loss": loss, "loss/text": loss}, {})) for step, loss in enumerate(losses)
    ]
    assert [each.kinds for each in found[-3:]] == [{"spike"}, {"spike"}, frozenset()]
    deviations = (9.0 - 2.0) / (1.4826 * 0.05)
    assert [each.score for each in found[-3:]] == pytest.approx([deviations, deviations, 0.0])
    assert [each.score for each in found[: LEAST - 1]] == [0.0] * (LEAST - 1)


def test_a_long_spike_is_declared_once_and_again_after_a_pause() -> None:
    assert judge([*CALM, 9.0, 9.0, 9.0, 2.0, 9.0]) == [(LEAST + 1, "spike"), (LEAST + 5, "spike")]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_declared_from_the_first_step(wrong: float) -> None:
    assert judge([2.0, wrong, wrong, 2.0]) == [(2, "not finite")]


def test_the_terms_that_are_not_finite_are_named() -> None:
    values = {"total_loss": math.nan, "loss/text": 1.0, "loss/image": math.nan}
    (event,) = Watch(6.0).judge(RecordedStep(1, values, {})).events
    assert event.detail == "image"


def test_batches_of_one_modality_have_a_past_of_their_own() -> None:
    watch = Watch(6.0)
    for number, loss in enumerate(CALM):
        assert not watch.judge(RecordedStep(number, {"total_loss": loss, "loss/text": loss}, {})).events
    assert not watch.judge(RecordedStep(90, {"total_loss": 9.0, "loss/image": 9.0}, {})).events
    found = watch.judge(RecordedStep(91, {"total_loss": 9.0, "loss/text": 9.0}, {}))
    assert [event.kind for event in found.events] == ["spike"]


def test_a_skipped_step_is_declared() -> None:
    (event,) = Watch(None).judge(RecordedStep(4, {"total_loss": 1.0, "skipped": 1.0}, {})).events
    assert (event.step, event.kind) == (4, "skipped")


def fed(step: int, updates: list[float], shares: list[float]) -> RecordedStep:
    """A step of a layer of four experts."""
    layer = "backbone.blocks.1.ffn.image"
    values = {f"expert_update/{layer}/expert{e}": value for e, value in enumerate(updates)}
    values |= {f"load/{layer}/image/expert{e}": value for e, value in enumerate(shares)}
    return RecordedStep(step, {"total_loss": 1.0, "loss/text": 1.0, **values}, {})


def frozen_at(updates: list[float], shares: list[float], steps: int = 12) -> list[tuple[int, str]]:
    watch = Watch(6.0)
    found = [event for step in range(1, steps + 1) for event in watch.judge(fed(step, updates, shares)).events]
    return [(event.step, event.detail) for event in found if event.kind == "frozen expert"]


def test_an_expert_with_tokens_and_without_updates_is_declared_once() -> None:
    ((step, detail),) = frozen_at([1.0, 1.1, 0.009, 0.9], [0.3, 0.3, 0.1, 0.3])
    assert step == STILL_STEPS and detail.startswith("backbone.blocks.1.ffn.image/expert2: chosen by tokens")
    assert frozen_at([1.0, 1.1, 0.011, 0.9], [0.3, 0.3, 0.1, 0.3]) == []  # it learns, slowly
    assert (
        frozen_at([1.0, 1.1, 0.0, 0.9], [0.3, 0.3, 0.06, 0.34]) == []
    )  # less than a quarter of 1 / 4: nothing to learn
    assert frozen_at([1.0, 1.1, 0.0, 0.9], [0.3, 0.3, 0.1, 0.3], steps=STILL_STEPS - 1) == []


def test_steps_without_updates_of_experts_are_left_out_of_the_count() -> None:
    """As after a skipped step, in which no expert moves and none is measured."""
    watch, still, shares = Watch(6.0), [1.0, 1.1, 0.0, 0.9], [0.3, 0.3, 0.1, 0.3]
    for step in range(1, STILL_STEPS):
        assert not watch.judge(fed(step, still, shares)).events
    assert not watch.judge(fed(STILL_STEPS, [], [])).events
    (event,) = watch.judge(fed(STILL_STEPS + 1, still, shares)).events
    assert event.kind == "frozen expert"
