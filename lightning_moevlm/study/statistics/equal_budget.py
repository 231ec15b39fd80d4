"""Reads the primary metric of every run at equal cost: equal tokens, active FLOPs or training time.

Arms of one study make the same number of steps, but a step may cost more in one of them. The common budget is the least
that any finished run spent. Every run is read where it had spent it, interpolated between the points that it logged.
Time is that of training at the run's median throughput, without start-up and validation. Tokens and FLOPs follow from
samples per step.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare.budget import samples_per_step
from lightning_moevlm.study.statistics.outcomes.stability import value_at
from lightning_moevlm.tracking.read.series import Series

THROUGHPUT = metric_keys.SAMPLES_PER_SECOND.key()
# The first logged throughput holds the warm-up of allocator and loader.
_WARM_UP_POINTS = 1


class StepCost(NamedTuple):
    """The cost of one optimiser step of a run; None if it is unknown."""

    tokens: float | None
    flops: float | None
    """Active, of the forward pass."""
    seconds: float | None


@dataclass(frozen=True)
class EqualBudget:
    """One common budget, and the runs' results with it."""

    what: str
    """"tokens", "active FLOPs" or "seconds"."""
    spent: float
    """By every run."""
    values: tuple[float | None, ...]
    """The primary metric of each run, in the order given; None if it was not finite there."""


def compute_step_cost(
    resolved: Mapping[str, Any], series: Mapping[str, Series], flops_per_sample: float | None
) -> StepCost:
    """Return the cost of a step.

    Args:
        resolved: The run's whole config.
        series: Its metrics.
        flops_per_sample: Active, of the forward pass; None if unknown.
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
    """Return the mean over logged intervals of the quotient of both rates, in which the seconds cancel out.

    Medians could be of two different intervals, which depend on the clock.
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
    """Return one budget per kind of cost that is known for every finished run.

    Args:
        runs: Cost of a step and the primary metric, of all runs with a result.
        finished: Whether each reached its end; a run that diverged and stopped does not shorten the budget.
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
