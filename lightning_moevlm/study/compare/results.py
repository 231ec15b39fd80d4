"""Holds the results of runs, of arms over their seeds, and of a whole study; reports are made of them."""

import math
import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.model_card import ModelCard
from lightning_moevlm.study.compare.fairness import Difference
from lightning_moevlm.study.declare.claims import Claim
from lightning_moevlm.study.declare.comparison import Arm, Comparison, Primary
from lightning_moevlm.study.run.ledger import RunState, Status
from lightning_moevlm.study.statistics.effects import Effect, Lost
from lightning_moevlm.study.statistics.factor_effects import FactorEffect
from lightning_moevlm.study.statistics.lr_sensitivity import Ladder
from lightning_moevlm.study.statistics.outcomes.arm_stability import ArmStability
from lightning_moevlm.study.statistics.outcomes.divergence import NONFINITE_STEP
from lightning_moevlm.study.statistics.outcomes.survival import Final, cap_failed
from lightning_moevlm.study.statistics.verdict import Rule, Verdict
from lightning_moevlm.tracking.read.series import Series


class Mean(NamedTuple):
    """Mean and sample standard deviation (None for n = 1) over n seeds with a finite value."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class RunResult:
    """One run."""

    arm: str
    seed: int
    resolved: Mapping[str, Any]
    """Whole config, nested, read-only."""
    max_steps: int | None
    """Optimiser steps planned; None if the clock ends the run."""
    state: RunState
    series: Mapping[str, Series]
    """By metric key."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """In MLflow."""

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.arm}-seed{self.seed}"

    def first(self, key: str) -> float | None:
        """First value of a metric; for validation metrics the untrained model's, None if that was not validated."""
        series = self.series.get(key)
        return series.values[0] if series and metric_keys.is_untrained(key, series.steps[0]) else None

    def last(self, key: str) -> float | None:
        """Last value of a metric; NaN if the training loss was not finite after it: that model is lost."""
        series, guard = self.series.get(key), self.series.get(NONFINITE_STEP)
        if series is None:
            return None
        return math.nan if guard and series.steps[-1] < guard.values[0] else series.values[-1]


@dataclass(frozen=True)
class ArmResult:
    """One arm over its seeds. A run survived if it finished, and neither diverged nor did not learn."""

    arm: Arm
    card: ModelCard | None
    """None if its model cannot be built."""
    runs: tuple[RunResult, ...]
    final: Mean | None
    """Last value of the primary metric, over runs that survived."""
    untrained: Mean | None
    """First value of the primary metric, over runs with a result."""
    learned: int
    """Seeds whose last value is better than the first."""
    effect: Effect | None
    """None for the baseline."""
    accuracy: Mapping[str, Mean]
    """Final accuracy by term of the objective that predicts classes, a fraction, over runs that survived."""
    majority: Mapping[str, Mean]
    """Accuracy of the constant answer, likewise."""
    also: Mapping[str, Mean]
    """Last values of the further metrics and of the trivial values, by key (`list_also`), over runs that survived."""
    stability: ArmStability
    equal: Mapping[str, Mean]
    """The primary metric at equal cost, by kind of cost, over runs that survived."""
    samples_per_second: Mean | None
    """Median after warm-up."""
    seconds: Mean | None
    """Wall time of a run."""
    finished: int
    """Number of runs that survived; the next ones are numbers of runs too."""
    diverged: int
    not_learned: int
    crashed: int
    planned: int

    @property
    def failed(self) -> int:
        """Number of runs that diverged or did not learn."""
        return self.diverged + self.not_learned

    @property
    def done(self) -> int:
        """Number of runs with a result."""
        return self.finished + self.failed

    @property
    def verdict(self) -> Verdict:
        """The verdict on this arm."""
        return self.effect.verdict if self.effect else Verdict.BASELINE


@dataclass(frozen=True)
class LadderResult:
    """One ladder of learning rates."""

    ladder: Ladder
    sensitivity: Mean | None
    """Over the seeds that have a result at every rate."""
    finals: Mapping[float, Mean | None]
    """The primary metric by rate, over runs with a result; a failed one counts with its capped value."""
    stable: Mapping[float, int]
    """Runs by rate."""
    total: Mapping[float, int]
    largest_stable: float | None
    """The largest rate up to which every run of every seed was stable."""
    missing: Mapping[str, tuple[int, ...]]
    """Seeds of the study without a result, by arm; arms that have all are absent."""
    by_seed: Mapping[int, float] = field(default_factory=dict)
    """The sensitivity of each seed."""


class Reproduction(StrEnum):
    """What the runs say of a published claim."""

    REPRODUCED = "reproduced"
    NOT_SEEN = "not seen"  # neither shown nor refuted
    REVERSED = "reversed"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class ClaimResult:
    """One published claim, held against the runs."""

    claim: Claim
    verdict: Reproduction
    effect: Effect
    """The measure of the arm minus that of the other, paired by seed. Its own verdict reads lower values as better."""
    mine: Mean | None
    """The measure of the arm, over seeds that are compared."""
    theirs: Mean | None
    """The measure that it is compared with."""


@dataclass(frozen=True)
class StudyResult:
    """The results of a comparison, arms in the order of their declaration."""

    comparison: Comparison
    arms: tuple[ArmResult, ...]
    unlike: tuple[Difference, ...] = ()
    """Differences between the runs that may bias the comparison."""
    budgets: Mapping[str, float] = field(default_factory=dict)
    """The cost that all finished runs have spent, by kind."""
    ladders: tuple[LadderResult, ...] = ()
    """Arms that differ in the learning rate alone."""
    factors: tuple[FactorEffect, ...] = ()
    """Main effects and interactions of a design that crosses factors."""
    claims: tuple[ClaimResult, ...] = ()
    """Published results that the study tests."""
    unjudged: tuple[str, ...] = ()
    """Runs for which the rule `did_not_learn` waits for the healthy arm, each with the reason."""

    @property
    def complete(self) -> bool:
        """Whether every planned run has a result."""
        return all(run.state.status.is_settled for arm in self.arms for run in arm.runs)

    @property
    def baseline(self) -> ArmResult:
        """The arm that the others are compared with."""
        return next(arm for arm in self.arms if arm.arm.name == self.comparison.baseline)


def make_rule(comparison: Comparison) -> Rule:
    """Return how the verdicts are reached."""
    decide = comparison.decide
    return Rule(comparison.primary.direction, decide.alpha, decide.test, decide.correction, decide.within)


def list_also(comparison: Comparison) -> tuple[str, ...]:
    """Return the keys of the further metrics, then those of the trivial values beside them and the primary metric."""
    measured = (comparison.primary.metric, *comparison.also)
    trivial = (beside for key in measured if (beside := metric_keys.find_trivial(key)) is not None)
    return tuple(dict.fromkeys((*comparison.also, *trivial)))


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """Return mean and deviation of the finite values; None without any."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return None
    return Mean(statistics.fmean(finite), statistics.stdev(finite) if len(finite) > 1 else None, len(finite))


def read_finals(runs: Sequence[RunResult], primary: Primary) -> dict[int, Final]:
    """Return the value with which each run counts, by seed; runs without a result or a value are absent."""
    finals = {}
    for run in runs:
        value, failed = run.last(primary.metric), run.state.status.is_failed_result
        if failed:
            value = cap_failed(value, run.first(primary.metric), primary.direction)
        if run.state.status.has_result and value is not None:
            finals[run.seed] = Final(value, failed)
    return finals


def read_values(runs: Sequence[RunResult], key: str) -> dict[int, float]:
    """Return the last value of a metric by seed, of the runs that survived and have logged it."""
    survived = [run for run in runs if run.state.status is Status.FINISHED]
    return {run.seed: value for run in survived if (value := run.last(key)) is not None}


def ended_seeds(runs: Sequence[RunResult]) -> set[int]:
    """Return the seeds of the runs that have a result or crashed."""
    return {run.seed for run in runs if run.state.status.has_result or run.state.status is Status.FAILED}


def count_status(runs: Sequence[RunResult], status: Status) -> int:
    """Return the number of runs with a status."""
    return sum(run.state.status is status for run in runs)


def count_lost(runs: Sequence[RunResult], finals: Mapping[int, Final], paired: Set[int]) -> Lost:
    """Return the runs that have no value to compare: crashed, or diverged beside an untrained model without one.

    Args:
        runs: All runs of an arm.
        finals: Those with a value.
        paired: Seeds for which the other side has an ended run, too.
    """
    gone = [run for run in runs if run.seed not in finals]
    unpaired = [run for run in gone if run.seed not in paired]
    counted = (count_status(gone, Status.DIVERGED), count_status(gone, Status.FAILED))
    return Lost(*counted, unpaired=count_status(unpaired, Status.DIVERGED) + count_status(unpaired, Status.FAILED))


def peak_memory_of_run(run: RunResult) -> float | None:
    """Return a run's peak memory in MiB: of the device if it was logged, else of the process."""
    for key in (metric_keys.PEAK_DEVICE_MEMORY.key(), metric_keys.PEAK_PROCESS_MEMORY.key()):
        if key in run.series:
            return max(run.series[key].values)  # a resumed run is a second process, which counts anew
    return None


def peak_memory_of(runs: Sequence[RunResult]) -> Mean | None:
    """Return mean and deviation of the peaks of the runs with a result."""
    return mean_of([peak_memory_of_run(run) for run in runs if run.state.status.has_result])
