"""Builds the tables of stability, learning rates, equal budgets and fairness."""

from collections.abc import Callable

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.fairness import ASPECTS
from lightning_moevlm.study.compare.results import ArmResult, LadderResult, StudyResult
from lightning_moevlm.study.report.tables.table import (
    NOTHING,
    Table,
    format_count,
    format_mean,
    format_percent,
    format_seed_count,
)
from lightning_moevlm.study.run.ledger import Status
from lightning_moevlm.study.statistics.outcomes.arm_stability import Recovery
from lightning_moevlm.study.statistics.outcomes.stability import Stability
from lightning_moevlm.study.statistics.paired_tests import format_p
from lightning_moevlm.study.statistics.verdict import Verdict

_MANY_FAILURES = 12  # reasons that a table gives
_BUDGET_UNITS = {"tokens": "tokens", "active FLOPs": "forward FLOPs", "seconds": "s of training"}


def stability_table(result: StudyResult) -> Table:
    """Return stable runs, spikes and recovery of each arm."""
    alpha = result.comparison.decide.alpha
    level = f"{100 * (1 - alpha):g} %"
    columns = (
        "arm", "stable", f"{level} interval", "p", "diverged at", "did not learn",
        "spikes: loss", "gradient", "update", "recovery",
    )  # fmt: skip
    rows = tuple((arm.arm.name, *_stability_cells(arm, alpha)) for arm in result.arms)
    tests = sorted({arm.stability.test for arm in result.arms if arm.stability.test})
    notes = (
        "stable: runs with a result that neither diverged nor did not learn, and the exact interval of their share. "
        f"{_explain_tests(tests)}diverged at: step of the first divergence. did not learn: runs.",
        "spikes: share of logged points at least 7 deviations from the mean of the 1,000 points before them, mean over "
        "seeds. A run needs 11 points. recovery: optimiser steps from a spike of the loss until it is back, the "
        f"longest of each run; geometric mean over the runs that recovered, with its {level} t interval.",
        *_notes_on_failures(result),
    )
    return Table("Stability", columns, rows, notes, essential=6, figure="spikes")


def signs_table(result: StudyResult) -> Table:
    """Return the numbers that grow before a divergence or a collapse of the routing."""
    columns = ("arm", "attention logit", "router logit", "|log Z|", "dead experts", "MaxVio", "R_g")
    rows = tuple(
        (
            arm.arm.name,
            *(_number(arm.stability.worst(read)) for read in _LARGEST),
            _share(arm.stability.mean(lambda run: run.dead_share)),
            _number(arm.stability.mean(lambda run: run.max_violation)),
            _number(arm.stability.mean(lambda run: run.balance_share)),
        )
        for arm in result.arms
    )
    notes = (
        "attention logit, router logit, |log Z| of the outputs: largest over steps, blocks and seeds. dead experts: "
        "share of logged steps with one. MaxVio: max load / mean load - 1, mean over steps and layers. R_g: gradient "
        "of balance losses / whole gradient, on router weights, mean over the steps with receipts and over seeds.",
    )
    return Table("Signs of trouble: logits and routing", columns, rows, notes, figure="expert_load")


def equal_budget_table(result: StudyResult) -> Table | None:
    """Return the primary metric at equal cost; None if no cost of a step is known."""
    if not result.budgets:
        return None
    title, _ = name_and_unit(result.comparison.primary.metric)
    columns = ("arm", *(f"at {format_count(spent)} {_BUDGET_UNITS[what]}" for what, spent in result.budgets.items()))
    rows = tuple(
        (
            arm.arm.name,
            *(
                format_mean(arm.equal.get(what), 4) + format_seed_count(arm.equal.get(what), arm.planned)
                for what in result.budgets
            ),
        )
        for arm in result.arms
    )
    notes = (
        "Each budget is the least that any finished run spent. Values between two validations are interpolated. Time "
        "is that of training at the run's median throughput. Mean ± standard deviation over runs that survived. (k of "
        "n): the other runs failed, have no finite value there, or no result.",
    )
    return Table(f"{title[0].upper() + title[1:]} at equal budgets", columns, rows, notes, figure="pareto")


def sensitivity_table(result: StudyResult) -> Table | None:
    """Return the sensitivity to the learning rate; None if no arms differ in it alone."""
    if not result.ladders:
        return None
    rates = tuple(dict.fromkeys(rate for one in result.ladders for rate in one.ladder.rungs))
    columns = ("ladder", "sensitivity", "largest stable", *(f"lr {rate:g}" for rate in sorted(rates)))
    rows = tuple(
        (
            one.ladder.name,
            format_mean(one.sensitivity, 4) + format_seed_count(one.sensitivity, len(result.comparison.seeds)),
            NOTHING if one.largest_stable is None else f"{one.largest_stable:g}",
            *(_rung(one, rate) for rate in sorted(rates)),
        )
        for one in result.ladders
    )
    title, _ = name_and_unit(result.comparison.primary.metric)
    notes = (
        f"sensitivity: mean over learning rates of min({title}, untrained) - best of the ladder (arXiv 2309.14322). "
        "Lower is better. Mean over seeds. (k of n): over the k seeds with a result at every rate. largest stable: up "
        "to this rate every run is stable. lr: mean of final values, those of failed runs capped at the untrained "
        "model's; stable/all runs.",
        *(note for one in result.ladders for note in _notes_on_ladder(one)),
    )
    return Table("Sensitivity to the learning rate", columns, rows, notes, essential=3, figure="learning_rates")


def _notes_on_ladder(one: LadderResult) -> list[str]:
    """Return the arms and seeds that a ladder leaves out."""
    name, twins = one.ladder.name, one.ladder.twins
    return [
        *(f"{name}: {arm} is left out, because {other} has the same learning rate." for arm, other in twins.items()),
        *(
            f"{name}: the sensitivity leaves out seed {', '.join(map(str, seeds))}, without a result of {arm}."
            for arm, seeds in one.missing.items()
        ),
    ]


def fairness_table(result: StudyResult) -> Table:
    """Return the differences between the runs."""
    runs = sum(arm.done for arm in result.arms)
    aspects = ", ".join(aspect.name.removesuffix(" of") for aspect in ASPECTS)
    alike = (("everything compared", "alike", f"{runs} runs: {aspects}"),)
    rows = tuple((one.name, str(one.weight), one.text) for one in result.unlike) or alike
    notes = (
        "biases: steps, schedule, batch, data, data order and validation samples must be the same. warns: active FLOPs "
        "more than 1 % apart, commit, kernels, dtypes, devices, versions. declared: an arm of the study file sets it.",
    )
    return Table("Fairness: what was not the same in all runs", ("what", "weight", "values"), rows, notes)


def _stability_cells(arm: ArmResult, alpha: float) -> tuple[str, ...]:
    own = arm.stability
    first, is_sample = own.first_divergence, arm.verdict is not Verdict.STOPPED_EARLY
    return (
        str(own.survival) if own.survival.total and is_sample else NOTHING,
        f"{own.interval[0]:.2f} to {own.interval[1]:.2f}" if own.interval and is_sample else NOTHING,
        NOTHING if own.p is None else format_p(own.p, alpha),
        NOTHING if first is None else f"step {first}",
        f"{arm.not_learned} of {arm.done}" if arm.not_learned else NOTHING,
        *(_share(own.mean(read)) for read in _SPIKES),
        format_recovery(own.recovery, is_known=own.worst(lambda run: run.recovery_steps) is not None),
    )


def _explain_tests(tests: list[str]) -> str:
    """Return one sentence on the tests of the shares; empty without a comparison."""
    paired = "McNemar's exact test of the seeds in which only one of the two runs is stable"
    named = {"McNemar": paired, "Fisher": "Fisher's exact test, where the seeds of both differ"}
    return f"p: against the baseline, {', or '.join(named[test] for test in reversed(tests))}. " if tests else ""


def _notes_on_failures(result: StudyResult) -> list[str]:
    """Return the rule of learning, why each run failed by it, and the runs that wait for their judgement."""
    rule = result.comparison.did_not_learn
    if rule is None:
        return []
    failed = [
        f"{run.name}: {run.state.reason}."
        for arm in result.arms
        for run in arm.runs
        if run.state.status is Status.DID_NOT_LEARN
    ]
    more = [f"... and {len(failed) - _MANY_FAILURES} more."] if len(failed) > _MANY_FAILURES else []
    waiting = [f"not judged yet: {reason}." for reason in result.unjudged]
    return [f"did not learn: {rule.text}.", *failed[:_MANY_FAILURES], *more, *waiting]


Read = Callable[[Stability], float | None]
_SPIKES: tuple[Read, ...] = (
    lambda run: run.spikes_loss,
    lambda run: run.spikes_gradient,
    lambda run: run.spikes_update,
)
_LARGEST: tuple[Read, ...] = (
    lambda run: run.largest_attention_logit,
    lambda run: run.largest_router_logit,
    lambda run: run.largest_log_partition,
)


def _share(value: float | None) -> str:
    return NOTHING if value is None else format_percent(value)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def format_recovery(found: Recovery, is_known: bool) -> str:
    """Return e.g. `12 [5, 29], never in 1 of 3`; 0 if no run had a spike. is_known: a run has enough points."""
    if not found.spiked:
        return "0" if is_known else NOTHING
    never = f"never in {found.spiked - found.recovered} of {found.spiked}" if found.recovered < found.spiked else ""
    if found.steps is None:
        return never
    around = f" [{found.interval.low:.3g}, {found.interval.high:.3g}]" if found.interval else ""
    return ", ".join(filter(None, (f"{found.steps:.3g}{around}", never)))


def _rung(one: LadderResult, rate: float) -> str:
    if rate not in one.ladder.rungs or not one.total[rate]:
        return NOTHING
    mean = one.finals[rate]
    return f"{mean.mean:.4f}, {one.stable[rate]}/{one.total[rate]}" if mean else f"{one.stable[rate]}/{one.total[rate]}"
