"""Records of what a study gave: runs, arms over their seeds, the whole; tables and figures are made of them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.compare.fairness import Difference
from lightning_moevlm.study.declare.comparison import Arm, Comparison
from lightning_moevlm.study.run.ledger import RunState
from lightning_moevlm.study.statistics.arm_stability import ArmStability
from lightning_moevlm.study.statistics.divergence import NONFINITE_STEP
from lightning_moevlm.study.statistics.effects import Effect
from lightning_moevlm.study.statistics.factor_effects import FactorEffect
from lightning_moevlm.study.statistics.lr_sensitivity import Ladder
from lightning_moevlm.study.statistics.verdict import Rule, Verdict
from lightning_moevlm.tracking.read.series import Series

if TYPE_CHECKING:
    from lightning_moevlm.contracts.model_card import ModelCard


class Mean(NamedTuple):
    """Mean and sample standard deviation (None for n = 1) over n seeds with a finite value."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class RunResult:
    """One run: of which arm and seed, where it stands, what it logged (by metric key), and its tags in the tracker.

    resolved: its whole config, nested, for reading only. max_steps: optimiser steps that it was to make, None where the
    clock ends it.
    """

    arm: str
    seed: int
    resolved: Mapping[str, Any]
    max_steps: int | None
    state: RunState
    series: Mapping[str, Series]
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.arm}-seed{self.seed}"

    def first(self, key: str) -> float | None:
        """First value of a metric; of validation metrics the untrained model's, None where that was not validated."""
        series = self.series.get(key)
        return series.values[0] if series and metric_keys.is_untrained(key, series.steps[0]) else None

    def last(self, key: str) -> float | None:
        """Last value of a metric; NaN where the training loss was no number after it: that model is gone."""
        series, guard = self.series.get(key), self.series.get(NONFINITE_STEP)
        if series is None:
            return None
        return math.nan if guard and series.steps[-1] < guard.values[0] else series.values[-1]


@dataclass(frozen=True)
class ArmResult:
    """One arm over its seeds.

    card: None where its model is not known.
    final, untrained: the primary metric's last and first value. learned: in how many seeds the last value is
    ahead of the first. accuracy, majority: by term of the objective, masked accuracy and that of the constant answer,
    both at the end. also: last values of the study's other metrics. stability: of the runs with a result. equal: the
    primary metric where all runs have spent the same, by what they spent. samples_per_second: median after warm-up.
    seconds: wall time of a run. finished, diverged, failed, planned: numbers of runs; planned is the study's.
    """

    arm: Arm
    card: "ModelCard | None"
    runs: tuple[RunResult, ...]
    final: Mean | None
    untrained: Mean | None
    learned: int
    effect: Effect | None
    accuracy: Mapping[str, Mean]
    majority: Mapping[str, Mean]
    also: Mapping[str, Mean]
    stability: ArmStability
    equal: Mapping[str, Mean]
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
class LadderResult:
    """One ladder of learning rates."""

    ladder: Ladder
    sensitivity: Mean | None
    """Over the seeds that have a result at every rate."""
    finals: Mapping[float, Mean | None]
    """The primary metric by rate."""
    stable: Mapping[float, int]
    """Runs by rate."""
    total: Mapping[float, int]
    largest_stable: float | None
    """The largest rate up to which every run of every seed was stable."""
    missing: Mapping[str, tuple[int, ...]]
    """Seeds of the study without a result, by arm; arms that have all are absent."""


@dataclass(frozen=True)
class StudyResult:
    """What was compared and what it gave, arms in the order of their declaration.

    unlike: in what the runs were not alike. budgets: what all finished runs have spent, by what was spent. ladders:
    arms that differ in the learning rate alone. factors: main effects and interactions of a factorial design.
    """

    comparison: Comparison
    arms: tuple[ArmResult, ...]
    unlike: tuple[Difference, ...] = ()
    budgets: Mapping[str, float] = field(default_factory=dict)
    ladders: tuple[LadderResult, ...] = ()
    factors: tuple[FactorEffect, ...] = ()

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


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """Return mean and deviation of the finite values, or None where there is none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return None
    return Mean(statistics.fmean(finite), statistics.stdev(finite) if len(finite) > 1 else None, len(finite))


def read_finals(runs: Sequence[RunResult], key: str) -> dict[int, float]:
    """Return the last value of a metric by seed, of the runs with a result that have logged it."""
    done = [run for run in runs if run.state.status.has_result]
    return {run.seed: value for run in done if (value := run.last(key)) is not None}


def peak_memory_of_run(run: RunResult) -> float | None:
    """Return a run's peak memory in MiB: on the device where that was logged, else of the process."""
    for key in (metric_keys.PEAK_DEVICE_MEMORY.key(), metric_keys.PEAK_PROCESS_MEMORY.key()):
        if key in run.series:
            return max(run.series[key].values)  # a resumed run is a second process, which counts anew
    return None


def peak_memory_of(runs: Sequence[RunResult]) -> Mean | None:
    """Return mean and deviation of the peaks of the runs with a result."""
    return mean_of([peak_memory_of_run(run) for run in runs if run.state.status.has_result])
