"""Decides whether a run that reached its end has learned. That it has not is a result, as a divergence is.

By the study's rule (`did_not_learn`) a run has not learned if one of this holds for the rule's metric:

- progress: its end lies at less than `share_of_healthy` of the way that the healthy run of the same seed went from its
  untrained model to its end; the way is the healthy run's alone, since arms may start from other values;
- constant answer: at its end it is no better than the metric `no_better_than` at its end;
- stall: its last `stalled_steps` optimiser steps brought no value better than the best one before;

or if its last value is not finite. Most of the way from an untrained model is made in the first steps, by sick models
too, which learn the scale of the outputs and the frequencies of tokens. So choose the share from the healthy curve:
more than it had reached after a third of its steps, say.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare.comparison import DidNotLearn
from lightning_moevlm.tracking.read.series import Series


class Learning(NamedTuple):
    """The judgement of a run; all texts are empty for one that has learned."""

    failure: str = ""
    """Why the run did not learn."""
    unknown: str = ""
    """Why the healthy arm could not be the measure; it may be later."""
    unlogged: str = ""
    """What the run has not logged, without which a rule cannot be applied."""


def judge_learning(
    run: Mapping[str, Series], rule: DidNotLearn, healthy: Mapping[str, Series] | None = None
) -> Learning:
    """Judge a run that reached its end and has not diverged.

    Args:
        run: Its series by metric key.
        rule: The study's.
        healthy: Series of the healthy run of the same seed; None if it has no sound result.
    """
    own = run.get(rule.metric)
    if own is None or not own.steps:
        return Learning(unlogged=f"no {rule.metric}")
    if not math.isfinite(own.values[-1]):
        return Learning(f"{rule.metric} is {own.values[-1]} at its end")
    found = [
        _judge_progress(own, rule, None if healthy is None else healthy.get(rule.metric)),
        _judge_constant(own, rule, run),
        _judge_stall(own, rule),
    ]
    order = ("failure", "unlogged", "unknown")
    return next((one for name in order for one in found if getattr(one, name)), Learning())


def _judge_progress(own: Series, rule: DidNotLearn, healthy: Series | None) -> Learning:
    share = rule.share_of_healthy
    if share is None:
        return Learning()
    if healthy is None:
        return Learning(unknown=f"{rule.healthy} has no sound result with its seed")
    if not healthy.steps or not metric_keys.is_untrained(rule.metric, healthy.steps[0]):
        return Learning(unlogged=f"no {rule.metric} of the untrained {rule.healthy}")
    start, end = healthy.values[0], healthy.values[-1]
    way = _gain(start, end, rule)
    if not math.isfinite(way) or way <= 0:
        return Learning(unknown=f"{rule.healthy} itself made no progress with its seed")
    reached = _gain(start, own.values[-1], rule) / way
    if reached >= share:
        return Learning()
    return Learning(
        f"{rule.metric} ended at {own.values[-1]:.4g}, at {max(0.0, reached):.2f} of the way of {rule.healthy} from "
        f"{start:.4g} to {end:.4g}; {share:g} is asked for"
    )


def _judge_constant(own: Series, rule: DidNotLearn, run: Mapping[str, Series]) -> Learning:
    if rule.no_better_than is None:
        return Learning()
    constant = run.get(rule.no_better_than)
    if constant is None or not math.isfinite(constant.values[-1]):
        return Learning(unlogged=f"no {rule.no_better_than}")
    if _gain(constant.values[-1], own.values[-1], rule) > 0:
        return Learning()
    return Learning(
        f"{rule.metric} ended at {own.values[-1]:.4g}, no better than {rule.no_better_than}, {constant.values[-1]:.4g}"
    )


def _judge_stall(own: Series, rule: DidNotLearn) -> Learning:
    if rule.stalled_steps is None:
        return Learning()
    start = own.steps[-1] - rule.stalled_steps
    finite = [(step, value) for step, value in zip(*own, strict=True) if math.isfinite(value)]
    before = [value for step, value in finite if step <= start]
    if not before:
        return Learning(unlogged=f"no {rule.metric} before its last {rule.stalled_steps} steps")
    best = min(before) if rule.direction == "lower" else max(before)
    if any(_gain(best, value, rule) > 0 for step, value in finite if step > start):
        return Learning()
    return Learning(f"{rule.metric} has not been better than {best:.4g} in its last {rule.stalled_steps} steps")


def _gain(before: float, after: float, rule: DidNotLearn) -> float:
    return before - after if rule.direction == "lower" else after - before
