"""The primary metric of every run where all have spent the same: tokens, active FLOPs, or training time.

Arms of one study make the same number of steps, yet a step may cost more in one than in another. So the least that any
finished run spent is the common budget, and every run is read where it had spent just that, on the straight line
between the points that it logged. Time is that of training at the run's median throughput, without start-up and
validation; tokens and FLOPs follow from samples per step, so all three are the same for arms whose steps cost the same.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare.budget import samples_per_step
from lightning_moevlm.study.statistics.stability import value_at
from lightning_moevlm.tracking.read.series import Series

THROUGHPUT = metric_keys.SAMPLES_PER_SECOND.key()
# The first logged throughput holds the warm-up of allocator and loader.
_WARM_UP_POINTS = 1


class StepCost(NamedTuple):
    """What one optimiser step of a run takes; None where it cannot be told. flops: active, of the forward pass."""

    tokens: float | None
    flops: float | None
    seconds: float | None


@dataclass(frozen=True)
class EqualBudget:
    """One common budget and what the runs had reached with it.

    what: "tokens", "active FLOPs" or "seconds". spent: by every run. values: of the primary metric, by run, in
    the order given; None where a run was not sound there.
    """

    what: str
    spent: float
    values: tuple[float | None, ...]


def compute_step_cost(
    resolved: Mapping[str, Any], series: Mapping[str, Series], flops_per_sample: float | None
) -> StepCost:
    """Return what a step takes.

    Args:
        resolved: The run's whole config.
        series: What it logged.
        flops_per_sample: Active, of the forward pass; None where they are not known.
    """
    samples = samples_per_step(resolved)
    per_second = median_after_warm_up(series.get(THROUGHPUT))
    if samples is None:
        return StepCost(None, None, None)
    flops = None if flops_per_sample is None else samples * flops_per_sample
    tokens_per_sample = _tokens_per_sample(series)
    tokens = None if tokens_per_sample is None else samples * tokens_per_sample
    return StepCost(tokens, flops, samples / per_second if per_second else None)


def _tokens_per_sample(series: Mapping[str, Series]) -> float | None:
    """Return the mean over logged intervals: of each the quotient of both rates, in which its seconds cancel out.

    A quotient of two medians would be of two intervals, and which ones these are the clock decides.
    """
    rates = [series.get(key) for key in (metric_keys.TOKENS_PER_SECOND.key(), THROUGHPUT)]
    tokens, samples = (dict(zip(*one, strict=True)) if one else {} for one in rates)
    quotients = [tokens[step] / samples[step] for step in tokens if samples.get(step)]
    kept = [quotient for quotient in quotients[_WARM_UP_POINTS:] or quotients if math.isfinite(quotient)]
    return math.fsum(kept) / len(kept) if kept else None


def median_after_warm_up(series: Series | None) -> float | None:
    """Return a rate's median, its first logged interval left out."""
    values = series.values[_WARM_UP_POINTS:] or series.values if series else ()
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else None


def find_equal_budgets(runs: Sequence[tuple[StepCost, Series]], finished: Sequence[bool]) -> tuple[EqualBudget, ...]:
    """Return each budget that every finished run knows its cost in.

    Args:
        runs: Cost of a step and the primary metric, of all runs with a result.
        finished: Which of them went to the end; a run that diverged and stopped does not shorten the budget.
    """
    budgets = []
    for what, place in (("tokens", 0), ("active FLOPs", 1), ("seconds", 2)):
        costs = [cost[place] for cost, _ in runs]
        spent = [
            None if cost is None or not series.steps else cost * series.steps[-1]
            for cost, (_, series), ended in zip(costs, runs, finished, strict=True)
            if ended
        ]
        known = [one for one in spent if one is not None]
        if not known or len(known) < len(spent):
            continue
        least = min(known)
        values = tuple(
            None if not cost else value_at(series, _step(least / cost))
            for cost, (_, series) in zip(costs, runs, strict=True)
        )
        budgets.append(EqualBudget(what, least, values))
    return tuple(budgets)


def _step(quotient: float) -> float:
    """Return a step that rounding has moved off a whole number to that number."""
    return float(round(quotient)) if math.isclose(quotient, round(quotient), rel_tol=1e-9) else quotient
