"""Computes what each arm costs beyond the baseline: time, memory, parameters, FLOPs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_moevlm.study.compare.results import ArmResult, Mean, RunResult, StudyResult, mean_of, peak_memory_of_run
from lightning_moevlm.study.statistics.equal_budget import compute_step_cost


@dataclass(frozen=True)
class ArmCost:
    """One arm over its seeds; None if unknown."""

    arm: str
    seconds: Mean | None
    """Of one optimiser step."""
    memory: Mean | None
    """Peak, MiB."""
    more_time: Mean | None
    """Fraction of the baseline's, above it, of the seeds that have both; None for the baseline."""
    more_memory: Mean | None


def compute_costs(result: StudyResult) -> tuple[ArmCost, ...]:
    """Return the costs of every arm, in order."""
    base = result.baseline
    return tuple(
        ArmCost(
            arm.arm.name,
            mean_of(list(_seconds(arm).values())),
            mean_of(list(_memory(arm).values())),
            None if arm is base else _more(_seconds(arm), _seconds(base)),
            None if arm is base else _more(_memory(arm), _memory(base)),
        )
        for arm in result.arms
    )


def _more(arm: dict[int, float], base: dict[int, float]) -> Mean | None:
    return mean_of([arm[seed] / base[seed] - 1 for seed in arm if base.get(seed)])


def _seconds(arm: ArmResult) -> dict[int, float]:
    return _known(arm.runs, [compute_step_cost(run.resolved, run.series, None).seconds for run in arm.runs])


def _memory(arm: ArmResult) -> dict[int, float]:
    return _known(arm.runs, [peak_memory_of_run(run) for run in arm.runs])


def _known(runs: Sequence[RunResult], values: Sequence[float | None]) -> dict[int, float]:
    return {
        run.seed: value
        for run, value in zip(runs, values, strict=True)
        if run.state.status.has_result and value is not None and math.isfinite(value)
    }
