"""Stops an arm that is far behind at one step, if the study declares `futility_stop`.

    futility_stop: {at_step: 500, worse_by: 0.5}     # in the primary metric's unit

The rule. If a run's primary metric at `at_step` is worse than the baseline's of that step and seed by more than
`worse_by`, its arm is withdrawn: every seed of it is stopped at `at_step`, also those to come, and it gets no verdict.
Only logged points decide, so the order of runs does not matter. The baseline is never stopped.

Why it does not bias the paired test. There is one look at one step, for futility alone, as in group sequential trials
(Jennison and Turnbull, Group Sequential Methods, 2000). A withdrawn arm can only lose its verdict, and loses all seeds
at once. In the correction over the family it still counts, with p = 1, so no other arm's adjusted p gets smaller. Hence
an effect that is shown with the rule would be shown without it, and the family-wise error can only fall. Rules that
rank single runs (successive halving, arXiv 1502.07943; the median rule of Vizier) give up the pairing, and with it the
test.

The report shows a withdrawn arm's differences at `at_step` over all seeds as a description, without a test.
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
    """The reason for a withdrawal: the first seed, in the study's order, that meets the rule, with both values."""

    seed: int
    step: int
    value: float
    baseline: float


@dataclass(frozen=True)
class Withdrawal:
    """A withdrawn arm."""

    rule: FutilityStop
    metric: str
    decision: Decision
    differences: Mapping[int, float]
    """Arm minus baseline at the rule's step, by seed."""

    @property
    def why(self) -> str:
        """The values that met the rule, in words."""
        seed, step, value, baseline = self.decision
        return (
            f"{self.metric} at step {step} is {value:.4g} with seed {seed}, worse than the baseline's {baseline:.4g} "
            f"by more than {self.rule.worse_by:g}"
        )

    @property
    def text(self) -> str:
        """The text that the report shows in place of a verdict's evidence."""
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
        rule: The study's.
        primary: The metric of the values.
        arm: Its value at the rule's step by seed; seeds that have not reached it are absent. A non-finite value is a
            divergence, which another rule handles.
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


def withhold_verdict(seeds: tuple[int, ...], rule: Rule, reason: str) -> Effect:
    """Return an effect without numbers for a withdrawn arm, with the reason."""
    empty = compare_paired({}, {}, seeds, rule)
    return dataclasses.replace(empty, left_out=(), losses=(), verdict=Verdict.STOPPED_EARLY, limit=reason)


def find_withdrawals(
    comparison: Comparison, primaries: Iterable[tuple[str, int, Series | None]]
) -> dict[str, Withdrawal]:
    """Return the arms that the rule withdraws, also if their runs were not stopped in time.

    Args:
        comparison: Holds the rule; without one no arm is withdrawn.
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
