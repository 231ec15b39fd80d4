"""Builds the tables of stability, learning rates, equal budgets and fairness."""

import math
from collections.abc import Callable

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.fairness import ASPECTS
from lightning_moevlm.study.compare.results import LadderResult, StudyResult
from lightning_moevlm.study.report.tables.table import (
    NOTHING,
    Table,
    format_count,
    format_mean,
    format_percent,
    format_seed_count,
)
from lightning_moevlm.study.statistics.outcomes.arm_stability import ArmStability
from lightning_moevlm.study.statistics.outcomes.stability import Stability
from lightning_moevlm.study.statistics.paired_tests import format_p
from lightning_moevlm.study.statistics.verdict import Verdict

_BUDGET_UNITS = {"tokens": "tokens", "active FLOPs": "forward FLOPs", "seconds": "s of training"}


def stability_table(result: StudyResult) -> Table:
    """Return stable runs, spikes and recovery of each arm."""
    columns = ("arm", "stable", "p", "diverged at", "spikes: loss", "gradient", "update", "recovery")
    alpha = result.comparison.decide.alpha
    rows = tuple(
        (arm.arm.name, *_stability_cells(arm.stability, arm.verdict is Verdict.STOPPED_EARLY, alpha))
        for arm in result.arms
    )
    notes = (
        "stable: runs with a result that did not diverge. p: Fisher's exact test against the baseline. diverged at: "
        "step of the first divergence.",
        "spikes: share of logged points at least 7 deviations from the mean of the 1,000 points before them, mean over "
        "seeds. A run needs 11 points. recovery: longest recovery of the loss, in optimiser steps and in tokens of "
        "their batches.",
    )
    return Table("Stability", columns, rows, notes, essential=5, figure="spikes")


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
        "is that of training at the run's median throughput. Mean ± standard deviation over seeds. (k of n): the other "
        "runs have no finite value there, or no result.",
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
        "to this rate no run diverged. lr: mean final value, stable/all runs.",
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
    runs = sum(arm.finished + arm.diverged for arm in result.arms)
    aspects = ", ".join(aspect.name.removesuffix(" of") for aspect in ASPECTS)
    alike = (("everything compared", "alike", f"{runs} runs: {aspects}"),)
    rows = tuple((one.name, str(one.weight), one.text) for one in result.unlike) or alike
    notes = (
        "biases: steps, schedule, batch, data, data order and validation samples must be the same. warns: active FLOPs "
        "more than 1 % apart, commit, kernels, dtypes, devices, versions. declared: an arm of the study file sets it.",
    )
    return Table("Fairness: what was not the same in all runs", ("what", "weight", "values"), rows, notes)


def _stability_cells(arm: ArmStability, is_withdrawn: bool, alpha: float) -> tuple[str, ...]:
    first = arm.first_divergence
    return (
        f"{arm.stable}/{arm.total}" if arm.total and not is_withdrawn else NOTHING,
        NOTHING if arm.p is None else format_p(arm.p, alpha),
        NOTHING if first is None else f"step {first}",
        *(_share(arm.mean(read)) for read in _SPIKES),
        _recovery(arm),
    )


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


def _recovery(arm: ArmStability) -> str:
    steps, tokens = arm.worst(lambda run: run.recovery_steps), arm.worst(lambda run: run.recovery_tokens)
    if steps is None:
        return NOTHING
    if math.isinf(steps):
        return "never"
    return f"{steps:.0f}" + (f" ({format_count(tokens)} tokens)" if tokens else "")


def _rung(one: LadderResult, rate: float) -> str:
    if rate not in one.ladder.rungs or not one.total[rate]:
        return NOTHING
    mean = one.finals[rate]
    return f"{mean.mean:.4f}, {one.stable[rate]}/{one.total[rate]}" if mean else f"{one.stable[rate]}/{one.total[rate]}"
