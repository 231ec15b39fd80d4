"""Measures the stability of one run from its metrics. Pure functions; NaN and infinities are data.

- Divergence: the first step at which the loss was not finite.
- Spike score: the share of points at least 7 standard deviations away from the mean of the last 1,000 points before
  them, of task loss, gradient norm and update norm. Source: OLMo 2 (arXiv 2501.00656). A point is judged if 10 finite
  ones lie before it, so a run of fewer points has no score. A non-finite point is a spike and enters no mean. Spikes
  between logged points (`trainer.log_every_n_steps` above 1) are not seen.
- Recovery: the longest time from the start of a spike of the task loss until it is at most one deviation above the
  mean from before the spike.
- Largest attention and router logits, and largest |log Z| of the output softmax: they grow before a divergence
  (arXiv 2309.14322, section 3).
- Dead experts: the share of logged steps at which some layer had an expert without a token. MaxVio: mean over logged
  steps and layers of max load / mean load - 1 (arXiv 2408.15664).
- R_g: the share of the routers' gradient that comes from balance losses, mean over the steps on which the callback
  `Liveness` measured it (arXiv 2509.01322 watches such a ratio).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.statistics.outcomes.divergence import NONFINITE_STEP
from lightning_moevlm.tracking.read.series import Series

TRAIN_LOSS = metric_keys.TASK_LOSS.key(stage="train")
_ROUTER_SHARE = metric_keys.BALANCE_GRADIENT_SHARE.key(weights="router")
SPIKE_DEVIATIONS = 7.0
SPIKE_WINDOW = 1_000  # points
_ROWS = 1_000  # windows at once: 8 MB
_LEAST_WINDOW = 10  # points: the deviation of fewer is too rough to call seven of them anything


class Spikes(NamedTuple):
    """The spikes of a series."""

    is_spike: tuple[bool, ...]
    """By point."""
    judged: int
    """Number of points with enough others before them."""

    @property
    def score(self) -> float | None:
        """Share of judged points that are spikes; None without judged points."""
        return sum(self.is_spike) / self.judged if self.judged else None


@dataclass(frozen=True)
class Stability:
    """The stability of one run; None if a metric was not logged or has too few points."""

    diverged_at: int | None
    """Optimiser step."""
    spikes_loss: float | None
    """Share of points, as the next two."""
    spikes_gradient: float | None
    spikes_update: float | None
    recovered: bool | None
    """Whether the loss came back from every spike."""
    recovery_steps: float | None
    """Optimiser steps of the longest recovery; 0 without a spike, infinite if the loss never came back."""
    recovery_tokens: float | None
    """The same in tokens of the batches."""
    largest_attention_logit: float | None
    """Over steps, blocks and modalities, as the next two."""
    largest_router_logit: float | None
    largest_log_partition: float | None
    dead_share: float | None
    max_violation: float | None
    balance_share: float | None
    """R_g."""


def measure_stability(
    series: Mapping[str, Series], has_diverged: bool, tokens_per_step: float | None = None
) -> Stability:
    """Return the stability of a run.

    Args:
        series: By metric key.
        has_diverged: By the study's rule; only then is the step looked for.
        tokens_per_step: Tokens of one optimiser step, over all ranks and micro-batches.
    """
    steps = recovery(series.get(TRAIN_LOSS))
    return Stability(
        diverged_at=divergence_step(series) if has_diverged else None,
        spikes_loss=_score(series.get(TRAIN_LOSS)),
        spikes_gradient=_score(series.get(metric_keys.GRAD_NORM.key())),
        spikes_update=_score(series.get(metric_keys.UPDATE_NORM.key())),
        recovered=None if steps is None else math.isfinite(steps),
        recovery_steps=steps,
        recovery_tokens=None if steps is None or tokens_per_step is None else steps * tokens_per_step,
        largest_attention_logit=_largest(_family(series, metric_keys.ATTENTION_LOGIT_MAX)),
        largest_router_logit=_largest(_family(series, metric_keys.LOGIT_MAX)),
        largest_log_partition=_largest(_family(series, metric_keys.LOG_PARTITION_MAX)),
        dead_share=dead_share(_family(series, metric_keys.DEAD_EXPERTS)),
        max_violation=_mean(_family(series, metric_keys.MAX_VIOLATION)),
        balance_share=_mean([one for key, one in series.items() if key == _ROUTER_SHARE]),
    )


def divergence_step(series: Mapping[str, Series]) -> int | None:
    """Return the first step at which a loss was not finite; without one, the last step."""
    guard = series.get(NONFINITE_STEP)
    if guard:
        return int(guard.values[0])
    losses = [one for key, one in series.items() if metric_keys.TASK_LOSS.match(key)]
    bad = [step for one in losses for step, value in zip(*one, strict=True) if not math.isfinite(value)]
    return min(bad) if bad else max((one.steps[-1] for one in losses), default=None)


def spikes(values: tuple[float, ...], window: int = SPIKE_WINDOW) -> Spikes:
    """Find the points that lie `SPIKE_DEVIATIONS` or more from the mean of the up to `window` points before them.

    Standard deviations are the population's. After points without spread, every other value is a spike.
    """
    means, spreads = _before([value for value in values if math.isfinite(value)], window)
    is_spike, judged, known = [], 0, 0  # known: finite points so far
    for value in values:
        if known < _LEAST_WINDOW:
            is_spike.append(False)
        else:
            distance, limit = abs(value - means[known]), SPIKE_DEVIATIONS * spreads[known]
            is_spike.append(not (math.isfinite(value) and (distance == 0 or distance < limit)))
            judged += 1
        known += math.isfinite(value)
    return Spikes(tuple(is_spike), judged)


def _before(values: list[float], window: int) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the up to `window` values before each, and before the end; 0 before the first.

    While the window grows they are updated (Welford 1962), which is exact for equal values.
    """
    means, spreads, mean, squares = [0.0], [0.0], 0.0, 0.0
    for count, value in enumerate(values[:window], start=1):
        distance = value - mean
        mean += distance / count
        squares += distance * (value - mean)
        means.append(mean)
        spreads.append(math.sqrt(squares / count))
    for start in range(1, len(values) - window + 1, _ROWS):
        rows = sliding_window_view(np.array(values[start : start + _ROWS - 1 + window]), window)
        means += rows.mean(axis=1).tolist()
        spreads += rows.std(axis=1).tolist()
    return means, spreads


def recovery(loss: Series | None) -> float | None:
    """Return the steps of the longest recovery from an upward spike; infinite if it never came back."""
    if loss is None or (found := spikes(loss.values)).judged == 0:
        return None
    longest, i = 0.0, 0
    while i < len(loss.values):
        before = [v for v in loss.values[max(0, i - SPIKE_WINDOW) : i] if math.isfinite(v)]
        if not found.is_spike[i] or not before or loss.values[i] < float(np.mean(before)):
            i += 1
            continue
        level = float(np.mean(before)) + float(np.std(before))
        back = next((j for j in range(i + 1, len(loss.values)) if loss.values[j] <= level), None)
        if back is None:
            return math.inf
        longest, i = max(longest, float(loss.steps[back] - loss.steps[i])), back
    return longest


def dead_share(families: Iterable[Series]) -> float | None:
    """Return the share of logged steps at which any of the layers had a dead expert."""
    worst: dict[int, float] = {}
    for one in families:
        for step, value in zip(*one, strict=True):
            if math.isfinite(value):
                worst[step] = max(worst.get(step, 0.0), value)
    return sum(value > 0 for value in worst.values()) / len(worst) if worst else None


def value_at(series: Series, step: float) -> float | None:
    """Return a metric at a step, interpolated between its points; None outside of them or if not finite."""
    steps, values = series
    if not steps or not steps[0] <= step <= steps[-1]:
        return None
    after = next(i for i, s in enumerate(steps) if s >= step)
    if steps[after] == step:
        value = values[after]
    else:
        share = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
        value = values[after - 1] + share * (values[after] - values[after - 1])
    return value if math.isfinite(value) else None


def _family(series: Mapping[str, Series], metric: metric_keys.MetricKey) -> list[Series]:
    return [one for key, one in series.items() if metric.match(key) is not None]


def _score(series: Series | None) -> float | None:
    return spikes(series.values).score if series else None


def _finite(families: Iterable[Series]) -> list[float]:
    return [value for one in families for value in one.values if math.isfinite(value)]


def _largest(families: Iterable[Series]) -> float | None:
    """Return the largest value; an infinite one counts, NaN does not."""
    return max((v for one in families for v in one.values if not math.isnan(v)), default=None)


def _mean(families: Iterable[Series]) -> float | None:
    values = _finite(families)
    return sum(values) / len(values) if values else None
