"""Builds the table of costs: an arm's time per step and memory compared with the baseline's, beside its effect.

Costs are paired by seed, as effects are. Time per step is that of training at the run's median throughput. Runs of one
study share a machine, so the spread of the baseline's own time over seeds is the noise of an overhead.
"""

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.arm_costs import ArmCost, compute_costs
from lightning_moevlm.study.compare.results import ArmResult, Mean, StudyResult
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_mean, format_percent, format_signed


def costs_table(result: StudyResult) -> Table | None:
    """Return overhead beside effect; None if no run has logged its speed or memory."""
    costs = compute_costs(result)
    if not any(cost.seconds or cost.memory for cost in costs):
        return None
    title, unit = name_and_unit(result.comparison.primary.metric)
    effect = f"effect ({unit})" if unit else "effect"
    columns = ("arm", "time per step (ms)", "more time", "peak memory (MiB)", "more memory", effect, "verdict")
    rows = tuple(_row(arm, cost) for arm, cost in zip(result.arms, costs, strict=True))
    base = next(cost for cost in costs if cost.arm == result.comparison.baseline)
    notes = [
        f"more: relative to {base.arm}, paired by seed, mean ± standard deviation. effect: on {title}, arm minus "
        f"{base.arm}.",
        *_noise("time per step", base.seconds),
        *_noise("peak memory", base.memory),
        "peak memory: of tensors on the GPU since training began. Without a GPU: of the process, with libraries.",
    ]
    return Table("Costs beside effects", columns, rows, tuple(notes), essential=5, figure="pareto")


def _row(arm: ArmResult, cost: ArmCost) -> tuple[str, ...]:
    seconds = cost.seconds
    milliseconds = seconds and Mean(
        1e3 * seconds.mean, None if seconds.deviation is None else 1e3 * seconds.deviation, seconds.n
    )
    centre = arm.effect.centre if arm.effect else None
    return (
        arm.arm.name,
        format_mean(milliseconds, 1),
        _signed(cost.more_time),
        format_mean(cost.memory, 1),
        _signed(cost.more_memory),
        NOTHING if centre is None else format_signed(centre),
        arm.effect.text if arm.effect else str(arm.verdict),
    )


def _noise(what: str, mean: Mean | None) -> list[str]:
    if mean is None or mean.deviation is None or not mean.mean:
        return []
    share = format_percent(mean.deviation / mean.mean)
    return [f"noise: the baseline's own {what} varies by {share} over seeds (standard deviation / mean)."]


def _signed(mean: Mean | None) -> str:
    if mean is None:
        return NOTHING
    spread = f" ± {100 * mean.deviation:.1f}" if mean.deviation is not None else ""
    return f"{100 * mean.mean:+.1f}{spread} %"
