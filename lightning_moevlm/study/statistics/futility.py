"""`futility_stop`: an arm that is far behind at one step, named beforehand, is stopped there. Off unless declared.

    futility_stop: {at_step: 500, worse_by: 0.5}     # in the primary metric's unit

The rule. Once a run's primary metric at `at_step` is worse than the baseline's at that step and of that seed by more
than `worse_by`, its **arm** is withdrawn: every seed of it is stopped at `at_step`, also those yet to come, and it gets
no verdict. Where an arm stands is read from the points alone, so that it does not matter which run came first or was
already over. The baseline is never stopped.

Why it does not bias the paired test. One look at one step, for futility alone, as in group sequential trials (Jennison
and Turnbull, Group Sequential Methods, 2000): a withdrawn arm can only lose its verdict, and no seed of it is left out
of a comparison while another stays in. In the correction over the family it still counts, with p = 1, so no other arm's
adjusted p gets smaller. Hence whatever is shown to help or hurt with the rule would be shown without it too, and the
family-wise error can only fall. Rules that rank single runs (successive halving, arXiv 1502.07943; the median rule of
Vizier) give up the pairing, and with it the test.

Of a withdrawn arm the report tells the differences at `at_step` over all seeds: a description, no test.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lightning_moevlm.study.declare.comparison import Comparison, FutilityStop, Primary
from lightning_moevlm.study.statistics.effects import Effect, compare_paired, pair_differences
from lightning_moevlm.study.statistics.verdict import Rule, Verdict
from lightning_moevlm.tracking.read.series import Series

STOPPED_RULE = "stopped_early/rule"


class Decision(NamedTuple):
    """Why an arm is withdrawn: the first seed, in the study's order, that meets the rule, with both values."""

    seed: int
    step: int
    value: float
    baseline: float


@dataclass(frozen=True)
class Withdrawal:
    """An arm that is withdrawn. differences: arm minus baseline at the rule's step, by seed."""

    rule: FutilityStop
    metric: str
    decision: Decision
    differences: Mapping[int, float]

    @property
    def why(self) -> str:
        """The rule and the values that met it."""
        seed, step, value, baseline = self.decision
        return (
            f"{self.metric} at step {step} is {value:.4g} with seed {seed}, worse than the baseline's {baseline:.4g} "
            f"by more than {self.rule.worse_by:g}"
        )

    @property
    def text(self) -> str:
        """What the report says in place of a verdict's evidence."""
        values = self.differences.values()
        mean = sum(values) / len(values)
        return (
            f"stopped by rule: {self.why}; at that step {mean:+.4g} on average over {len(values)} seeds, from "
            f"{min(values):+.4g} to {max(values):+.4g}; a description, no test"
        )

    @property
    def tags(self) -> dict[str, str]:
        """The decision as tags of the stopped runs."""
        seed, step, value, baseline = self.decision
        return {
            STOPPED_RULE: self.rule.text,
            "stopped_early/step": str(step),
            "stopped_early/seed": str(seed),
            "stopped_early/value": repr(value),
            "stopped_early/baseline": repr(baseline),
        }


def check_futility(
    rule: FutilityStop,
    primary: Primary,
    arm: Mapping[int, float],
    baseline: Mapping[int, float],
    seeds: tuple[int, ...],
) -> Withdrawal | None:
    """Return why an arm is withdrawn, or None.

    Args:
        rule: As the study declares it.
        primary: The metric of the values.
        arm: Its value at the rule's step by seed; seeds that have not come so far are absent. A value that is not
            finite is a divergence, which is another rule's business.
        baseline: The same of the baseline.
        seeds: All of the study.
    """
    sign = 1.0 if primary.direction == "lower" else -1.0
    differences = pair_differences(arm, baseline, seeds)
    for seed, difference in differences.items():
        if sign * difference > rule.worse_by:
            decision = Decision(seed, rule.at_step, arm[seed], baseline[seed])
            return Withdrawal(rule, primary.metric, decision, differences)
    return None


def withhold_verdict(seeds: tuple[int, ...], rule: Rule, told: str) -> Effect:
    """Return the effect of a withdrawn arm: none, and why, in words."""
    empty = compare_paired({}, {}, seeds, rule)
    return dataclasses.replace(empty, left_out=(), losses=(), verdict=Verdict.STOPPED_EARLY, limit=told)


def find_withdrawals(
    comparison: Comparison, primaries: Iterable[tuple[str, int, Series | None]]
) -> dict[str, Withdrawal]:
    """Return the arms that the rule withdraws, whether their runs were stopped in time or not.

    Args:
        comparison: Whose rule; without one no arm is withdrawn.
        primaries: Arm, seed and primary metric of every run.
    """
    rule = comparison.futility_stop
    if rule is None:
        return {}
    values: dict[str, dict[int, float]] = {arm.name: {} for arm in comparison.arms}
    for arm, seed, series in primaries:
        if series is not None and rule.at_step in series.steps:
            values[arm][seed] = series.values[series.steps.index(rule.at_step)]
    base = values.pop(comparison.baseline)
    found = {
        name: check_futility(rule, comparison.primary, arm, base, comparison.seeds) for name, arm in values.items()
    }
    return {name: one for name, one in found.items() if one is not None}
