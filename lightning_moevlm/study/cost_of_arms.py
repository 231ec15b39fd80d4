"""The ledger of costs: what an arm takes more than the baseline, in time per step and in memory, beside what it buys.

Paired by seed, as effects are; time per step is that of training at the run's median throughput. Runs of one study
share a machine, so the spread of the baseline's own time over seeds is the noise that an overhead has to stand out of.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_moevlm.study.equal_budget import step_cost
from lightning_moevlm.study.results import ArmResult, Mean, RunResult, StudyResult, mean_of, peak_memory_of_run
from lightning_moevlm.study.table import NOTHING, Table, name_and_unit, percent, signed, with_deviation


@dataclass(frozen=True)
class ArmCost:
    """One arm over its seeds.

    seconds: of one optimiser step. memory: peak, MiB. more_time, more_memory: by how much of the baseline's the arm's
    is above it, a fraction per seed; None for the baseline and where no seed has both.
    """

    arm: str
    seconds: Mean | None
    memory: Mean | None
    more_time: Mean | None
    more_memory: Mean | None


def costs_of(result: StudyResult) -> tuple[ArmCost, ...]:
    """Return every arm's, in order."""
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


def costs_table(result: StudyResult) -> Table | None:
    """Return overhead beside effect, or None where no run has logged its speed."""
    costs = costs_of(result)
    if not any(cost.seconds or cost.memory for cost in costs):
        return None
    title, unit = name_and_unit(result.comparison.primary.metric)
    effect = f"effect ({unit})" if unit else "effect"
    columns = ("arm", "time per step (ms)", "more time", "peak memory (MiB)", "more memory", effect, "verdict")
    rows = tuple(_row(arm, cost) for arm, cost in zip(result.arms, costs, strict=True))
    base = next(cost for cost in costs if cost.arm == result.comparison.baseline)
    notes = [
        f"more: of {base.arm}'s, paired by seed, mean ± standard deviation; effect: on {title}, arm minus {base.arm}.",
        *_noise("time per step", base.seconds),
        *_noise("peak memory", base.memory),
        "peak memory: of tensors on the GPU since training began; without a GPU of the whole process, libraries "
        "included.",
    ]
    return Table("Costs beside effects", columns, rows, tuple(notes), essential=5, picture="pareto")


def _row(arm: ArmResult, cost: ArmCost) -> tuple[str, ...]:
    seconds = cost.seconds
    milliseconds = seconds and Mean(
        1e3 * seconds.mean, None if seconds.deviation is None else 1e3 * seconds.deviation, seconds.n
    )
    centre = arm.effect.centre if arm.effect else None
    return (
        arm.arm.name,
        with_deviation(milliseconds, 1),
        _signed(cost.more_time),
        with_deviation(cost.memory, 1),
        _signed(cost.more_memory),
        NOTHING if centre is None else signed(centre),
        arm.effect.word if arm.effect else str(arm.verdict),
    )


def _noise(what: str, mean: Mean | None) -> list[str]:
    if mean is None or mean.deviation is None or not mean.mean:
        return []
    share = percent(mean.deviation / mean.mean)
    return [f"noise: over seeds the baseline's own {what} varies by {share} (standard deviation / mean)."]


def _signed(mean: Mean | None) -> str:
    if mean is None:
        return NOTHING
    spread = f" ± {100 * mean.deviation:.1f}" if mean.deviation is not None else ""
    return f"{100 * mean.mean:+.1f}{spread} %"


def _more(arm: dict[int, float], base: dict[int, float]) -> Mean | None:
    return mean_of([arm[seed] / base[seed] - 1 for seed in arm if base.get(seed)])


def _seconds(arm: ArmResult) -> dict[int, float]:
    return _known(arm.runs, [step_cost(run.resolved, run.series, None).seconds for run in arm.runs])


def _memory(arm: ArmResult) -> dict[int, float]:
    return _known(arm.runs, [peak_memory_of_run(run) for run in arm.runs])


def _known(runs: Sequence[RunResult], values: Sequence[float | None]) -> dict[int, float]:
    return {
        run.seed: value
        for run, value in zip(runs, values, strict=True)
        if run.state.status.has_result and value is not None and math.isfinite(value)
    }
