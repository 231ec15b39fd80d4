"""What the runs of a study gave: series out of the tracker, gathered into records that tables and figures are made of.

Only runs with a result (finished or diverged) enter comparisons; runs that still go on are drawn, not counted.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lightning_moevlm import keys
from lightning_moevlm.study.effects import Effect, Lost, Verdict, paired_effect
from lightning_moevlm.study.ledger import RunState, Status
from lightning_moevlm.study.plan import Plan, PlannedRun
from lightning_moevlm.study.spec import Arm, Study
from lightning_moevlm.tracking.runs import Point, metric_histories

if TYPE_CHECKING:
    from lightning_moevlm.models.card import ModelCard

THROUGHPUT = keys.SAMPLES_PER_SECOND.key()
# The first logged throughput holds the warm-up of allocator and loader.
_WARM_UP_POINTS = 1


class Series(NamedTuple):
    """One metric of one run. steps: optimiser steps, ascending; values: as logged, also NaN and infinities."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


class Mean(NamedTuple):
    """Mean and sample standard deviation (None for n = 1) over n seeds with a finite value."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class RunResult:
    """One run: what was planned, where it stands, what it logged (by metric key)."""

    run: PlannedRun
    state: RunState
    series: Mapping[str, Series]

    def first(self, key: str) -> float | None:
        """First value of a metric; of validation metrics the untrained model's."""
        series = self.series.get(key)
        return series.values[0] if series else None

    def last(self, key: str) -> float | None:
        """Last value of a metric."""
        series = self.series.get(key)
        return series.values[-1] if series else None


@dataclass(frozen=True)
class ArmResult:
    """One arm over its seeds.

    final, untrained: the primary metric's last and first value. learned: in how many seeds the last value is
    ahead of the first. accuracy, majority: by term of the objective, masked accuracy and that of the constant answer,
    both at the end. also: last values of the study's other metrics. samples_per_second: median after warm-up.
    seconds: wall time of a run. finished, diverged, failed, planned: numbers of runs; planned is the study's.
    """

    arm: Arm
    card: "ModelCard"
    runs: tuple[RunResult, ...]
    final: Mean | None
    untrained: Mean | None
    learned: int
    effect: Effect | None
    accuracy: Mapping[str, Mean]
    majority: Mapping[str, Mean]
    also: Mapping[str, Mean]
    samples_per_second: Mean | None
    seconds: Mean | None
    finished: int
    diverged: int
    failed: int
    planned: int

    @property
    def verdict(self) -> Verdict:
        """The word for this arm."""
        return self.effect.verdict if self.effect else Verdict.BASELINE


@dataclass(frozen=True)
class StudyResult:
    """A study and what it gave, arms in the file's order."""

    study: Study
    arms: tuple[ArmResult, ...]

    @property
    def complete(self) -> bool:
        """Whether every planned run has a result."""
        return all(arm.finished + arm.diverged == arm.planned for arm in self.arms)

    @property
    def baseline(self) -> ArmResult:
        """The arm that the others are compared with."""
        return next(arm for arm in self.arms if arm.arm.name == self.study.baseline)


def gather(plan: Plan, ledger: Sequence[tuple[PlannedRun, RunState]], uri: str) -> StudyResult:
    """Fetch every series of every run that has been started, and compare the arms.

    Raises:
        MlflowException: the store cannot be read.
    """
    ids = [state.run_id for _, state in ledger if state.run_id is not None]
    histories = metric_histories(uri, ids)
    results = [RunResult(run, state, series_of(histories.get(state.run_id or "", []))) for run, state in ledger]
    return compare(plan, results)


def series_of(points: Sequence[Point]) -> dict[str, Series]:
    """Return points (ordered by key, then step) as one series per key."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for point in points:
        steps, values = columns.setdefault(point.key, ([], []))
        steps.append(point.step)
        values.append(point.value)
    return {key: Series(tuple(steps), tuple(values)) for key, (steps, values) in columns.items()}


def compare(plan: Plan, results: Sequence[RunResult]) -> StudyResult:
    """Gather runs into arms and compare every arm with the baseline, paired by seed."""
    by_arm = {arm.name: tuple(r for r in results if r.run.arm == arm.name) for arm in plan.study.arms}
    base = by_arm[plan.study.baseline]
    arms = tuple(_arm_result(plan, arm, by_arm[arm.name], base) for arm in plan.study.arms)
    return StudyResult(plan.study, arms)


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """Return mean and deviation of the finite values, or None where there is none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return None
    return Mean(statistics.fmean(finite), statistics.stdev(finite) if len(finite) > 1 else None, len(finite))


def throughput_of(result: RunResult) -> float | None:
    """Return a run's median samples per second, its first logged interval left out."""
    series = result.series.get(THROUGHPUT)
    if not series:
        return None
    return statistics.median(series.values[_WARM_UP_POINTS:] or series.values)


def _arm_result(plan: Plan, arm: Arm, runs: tuple[RunResult, ...], base: tuple[RunResult, ...]) -> ArmResult:
    study = plan.study
    primary = study.primary.metric
    done = [r for r in runs if r.state.status.has_result]
    sign = 1 if study.primary.direction == "lower" else -1
    return ArmResult(
        arm=arm,
        card=plan.cards[arm.name],
        runs=runs,
        final=mean_of([r.last(primary) for r in done]),
        untrained=mean_of([r.first(primary) for r in done]),
        learned=sum(_ahead(r, primary, sign) for r in done),
        effect=None if arm.name == study.baseline else _effect(study, runs, base),
        accuracy=_by_term(done, keys.ACCURACY),
        majority=_by_term(done, keys.MAJORITY_ACCURACY),
        also={key: mean for key in study.also if (mean := mean_of([r.last(key) for r in done]))},
        samples_per_second=mean_of([throughput_of(r) for r in done]),
        seconds=mean_of([r.state.seconds for r in done]),
        finished=_count(runs, Status.FINISHED),
        diverged=_count(runs, Status.DIVERGED),
        failed=_count(runs, Status.FAILED),
        planned=len(runs),
    )


def _ahead(result: RunResult, key: str, sign: int) -> bool:
    first, last = result.first(key), result.last(key)
    return first is not None and last is not None and sign * last < sign * first


def _effect(study: Study, runs: Sequence[RunResult], base: Sequence[RunResult]) -> Effect:
    return paired_effect(
        arm=_finals(runs, study.primary.metric),
        baseline=_finals(base, study.primary.metric),
        seeds=study.seeds,
        direction=study.primary.direction,
        alpha=study.decide.alpha,
        arm_lost=_lost(runs),
        baseline_lost=_lost(base),
    )


def _finals(results: Sequence[RunResult], key: str) -> dict[int, float]:
    done = [r for r in results if r.state.status.has_result]
    return {r.run.seed: value for r in done if (value := r.last(key)) is not None}


def _lost(results: Sequence[RunResult]) -> Lost:
    return Lost(_count(results, Status.DIVERGED), _count(results, Status.FAILED))


def _by_term(results: Sequence[RunResult], family: keys.MetricKey) -> dict[str, Mean]:
    """Return the last validation value of every term in a `{stage}/..._{term}` family."""
    terms: dict[str, list[float | None]] = {}
    for result in results:
        for key in result.series:
            parts = family.match(key)
            if parts and parts["stage"] == "val":
                terms.setdefault(parts["term"], []).append(result.last(key))
    return {term: mean for term, values in sorted(terms.items()) if (mean := mean_of(values))}


def _count(results: Sequence[RunResult], status: Status) -> int:
    return sum(r.state.status is status for r in results)
