"""Collects the metrics of runs from MLflow, groups them by arm and compares the arms with the baseline.

Only runs with a result (finished, diverged, did not learn) enter comparisons. Unfinished runs are drawn, not counted.
Means are over runs that survived. In differences paired by seed, a failed run counts with its capped value.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.model_card import ModelCard
from lightning_moevlm.study.compare.claims import judge_claims
from lightning_moevlm.study.compare.fairness import Subject, find_differences
from lightning_moevlm.study.compare.judged_runs import find_withdrawn, judge_learned, mark_stopped
from lightning_moevlm.study.compare.results import (
    ArmResult,
    LadderResult,
    Mean,
    RunResult,
    StudyResult,
    count_lost,
    count_status,
    ended_seeds,
    list_also,
    make_rule,
    mean_of,
    read_finals,
    read_values,
)
from lightning_moevlm.study.declare.comparison import Arm, Comparison
from lightning_moevlm.study.plan.plan_checks import FLOPS_TOLERANCE
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.report.tables.table import format_count
from lightning_moevlm.study.run.ledger import RunState, Status
from lightning_moevlm.study.run.mlflow_runs import ROLE, ROLE_ARM
from lightning_moevlm.study.statistics.effects import (
    Effect,
    check_guard,
    compare_paired,
    judge_family,
    pair_differences,
)
from lightning_moevlm.study.statistics.equal_budget import (
    THROUGHPUT,
    EqualBudget,
    StepCost,
    compute_step_cost,
    find_equal_budgets,
    median_after_warm_up,
)
from lightning_moevlm.study.statistics.factor_effects import FactorEffect, factor_effects, find_crossing
from lightning_moevlm.study.statistics.futility import withhold_verdict
from lightning_moevlm.study.statistics.lr_sensitivity import Ladder, find_ladders, largest_stable, sensitivity
from lightning_moevlm.study.statistics.outcomes.arm_stability import summarise_stability
from lightning_moevlm.study.statistics.outcomes.stability import TRAIN_LOSS, measure_stability
from lightning_moevlm.study.statistics.outcomes.survival import Final
from lightning_moevlm.study.statistics.verdict import GuardResult, Rule, Verdict
from lightning_moevlm.tracking.read.runs import tags_of_runs
from lightning_moevlm.tracking.read.series import Series, metric_series

Cards = Mapping[str, ModelCard | None]


def collect_results(plan: Plan, ledger: Sequence[tuple[PlannedRun, RunState]], uri: str) -> StudyResult:
    """Fetch every series of every started run, and compare the arms.

    Raises:
        MlflowException: The store cannot be read.
    """
    return compare_arms(plan.comparison, plan.cards, fetch_results(plan, ledger, uri))


def fetch_results(plan: Plan, ledger: Sequence[tuple[PlannedRun, RunState]], uri: str) -> list[RunResult]:
    """Fetch every series of every started run.

    Raises:
        MlflowException: The store cannot be read.
    """
    ids = [state.run_id for _, state in ledger if state.run_id is not None]
    series = metric_series(uri, ids) if ids else {}
    tags = tags_of_runs(uri, plan.comparison.name, {ROLE: ROLE_ARM}) if ids else {}
    return [
        to_result(run, state, series.get(state.run_id or "", {}), tags.get(state.run_id or "", {}))
        for run, state in ledger
    ]


def to_result(
    run: PlannedRun, state: RunState, series: Mapping[str, Series], tags: Mapping[str, str] = MappingProxyType({})
) -> RunResult:
    """Return the result of a planned run."""
    return RunResult(run.arm, run.seed, run.resolved, run.max_steps, state, series, tags)


def compare_arms(study: Comparison, cards: Cards, results: Sequence[RunResult]) -> StudyResult:
    """Group runs by arm and compare every arm with the baseline, paired by seed.

    Args:
        study: Arms, seeds and rules.
        cards: Model card by arm; None if unknown.
        results: Every run, at most one per arm and seed.

    Raises:
        UserError: A finished run has not logged what the study's rule `did_not_learn` needs.
    """
    withdrawn = find_withdrawn(study, results)
    results = [mark_stopped(r) if r.arm in withdrawn else r for r in results]
    results, unjudged = judge_learned(study, results)
    by_arm = {arm.name: tuple(r for r in results if r.arm == arm.name) for arm in study.arms}
    base = by_arm[study.baseline]
    rule = make_rule(study)
    effects = {name: _effect(study, rule, runs, base) for name, runs in by_arm.items() if name != study.baseline}
    effects |= {name: withhold_verdict(study.seeds, rule, reason) for name, reason in withdrawn.items()}
    judged = judge_family(effects, rule)
    done = [r for r in results if r.state.status.has_result]
    costs = [_cost(cards, r) for r in done]
    budgets = find_equal_budgets(
        [(cost, r.series.get(study.primary.metric, Series((), ()))) for cost, r in zip(costs, done, strict=True)],
        [r.state.status.has_whole_budget for r in done],
    )
    equal = _by_arm(budgets, done)
    arms = tuple(
        _arm_result(study, cards, arm, by_arm[arm.name], base, judged.get(arm.name), equal.get(arm.name, {}))
        for arm in study.arms
    )
    ladders = tuple(
        _ladder(study, ladder, by_arm)
        for ladder in find_ladders({arm: runs[0].resolved for arm, runs in by_arm.items() if runs})
    )
    return StudyResult(
        study,
        arms,
        unlike=find_differences([_subject(study, cards, r) for r in done]),
        budgets={budget.what: budget.spent for budget in budgets},
        ladders=ladders,
        factors=_factors(study, rule, by_arm),
        claims=judge_claims(study, by_arm, ladders),
        unjudged=unjudged,
    )


def measure_throughput(result: RunResult) -> float | None:
    """Return a run's median samples per second, its first logged interval left out."""
    return median_after_warm_up(result.series.get(THROUGHPUT))


def _arm_result(
    study: Comparison,
    cards: Cards,
    arm: Arm,
    runs: tuple[RunResult, ...],
    base: tuple[RunResult, ...],
    effect: Effect | None,
    equal: Mapping[str, Mean],
) -> ArmResult:
    primary = study.primary.metric
    done = [r for r in runs if r.state.status.has_result]
    survived = [r for r in done if r.state.status is Status.FINISHED]
    sign = 1 if study.primary.direction == "lower" else -1
    is_withdrawn = effect is not None and effect.verdict is Verdict.STOPPED_EARLY
    return ArmResult(
        arm=arm,
        card=cards[arm.name],
        runs=runs,
        final=mean_of([r.last(primary) for r in survived]),
        untrained=mean_of([r.first(primary) for r in done]),
        learned=sum(_has_improved(r, primary, sign) for r in done),
        effect=effect,
        accuracy=_by_term(survived, metric_keys.ACCURACY),
        majority=_by_term(survived, metric_keys.MAJORITY_ACCURACY),
        also={key: mean for key in list_also(study) if (mean := mean_of([r.last(key) for r in survived]))},
        stability=summarise_stability(
            {
                r.seed: measure_stability(r.series, r.state.status is Status.DIVERGED, _cost(cards, r).tokens)
                for r in done
            },
            _survival(runs),
            # a withdrawn arm has a result only of runs that diverged: not a sample
            None if arm.name == study.baseline or is_withdrawn else _survival(base),
            study.decide.alpha,
        ),
        equal=equal,
        samples_per_second=mean_of([measure_throughput(r) for r in done]),
        seconds=mean_of([r.state.seconds for r in done]),
        finished=count_status(runs, Status.FINISHED),
        diverged=count_status(runs, Status.DIVERGED),
        not_learned=count_status(runs, Status.DID_NOT_LEARN),
        crashed=count_status(runs, Status.FAILED),
        planned=len(runs),
    )


def _has_improved(result: RunResult, key: str, sign: int) -> bool:
    first, last = result.first(key), result.last(key)
    return first is not None and last is not None and sign * last < sign * first


def _effect(study: Comparison, rule: Rule, runs: Sequence[RunResult], base: Sequence[RunResult]) -> Effect:
    mine, theirs = read_finals(runs, study.primary), read_finals(base, study.primary)
    return compare_paired(
        arm=_values(mine),
        baseline=_values(theirs),
        seeds=study.seeds,
        rule=rule,
        arm_lost=count_lost(runs, mine, ended_seeds(base)),
        baseline_lost=count_lost(base, theirs, ended_seeds(runs)),
        guards=_guards(study, runs, base),
        arm_failed=_failed(mine),
        baseline_failed=_failed(theirs),
    )


def _factors(study: Comparison, rule: Rule, by_arm: Mapping[str, Sequence[RunResult]]) -> tuple[FactorEffect, ...]:
    """Return main effects and interactions, where the design crosses factors."""
    crossing = find_crossing(study.design, {arm.name: arm.levels for arm in study.arms})
    if crossing is None:
        return ()
    finals = {name: read_finals(runs, study.primary) for name, runs in by_arm.items()}
    ended = set(study.seeds).intersection(*map(ended_seeds, by_arm.values()))
    return factor_effects(
        {name: _values(own) for name, own in finals.items()},
        crossing,
        study.seeds,
        rule,
        {name: count_lost(runs, finals[name], ended) for name, runs in by_arm.items()},
        {name: _failed(own) for name, own in finals.items()},
    )


def _guards(study: Comparison, runs: Sequence[RunResult], base: Sequence[RunResult]) -> tuple[GuardResult, ...]:
    """Return the guards over runs that survived. They lack a seed in which the arm alone failed."""
    mine, theirs = read_finals(runs, study.primary), read_finals(base, study.primary)
    compared = tuple(
        seed for seed in pair_differences(_values(mine), _values(theirs), study.seeds) if not theirs[seed].failed
    )
    return tuple(
        check_guard(
            guard.metric,
            read_values(runs, guard.metric),
            read_values(base, guard.metric),
            study.seeds,
            guard.direction,
            guard.at_most,
            study.decide.alpha,
            compared,
        )
        for guard in study.guard
    )


def _cost(cards: Cards, result: RunResult) -> StepCost:
    card = cards[result.arm]
    return compute_step_cost(result.resolved, result.series, card.active_flops_per_sample if card else None)


def _by_arm(budgets: Sequence[EqualBudget], done: Sequence[RunResult]) -> dict[str, dict[str, Mean]]:
    """Return the results of each arm with every budget."""
    arms: dict[str, dict[str, Mean]] = {}
    for budget in budgets:
        for arm in dict.fromkeys(r.arm for r in done):
            survived = [r.arm == arm and r.state.status is Status.FINISHED for r in done]
            mean = mean_of([v for v, own in zip(budget.values, survived, strict=True) if own])
            if mean:
                arms.setdefault(arm, {})[budget.what] = mean
    return arms


def _subject(study: Comparison, cards: Cards, result: RunResult) -> Subject:
    arm = next(arm for arm in study.arms if arm.name == result.arm)
    logged = [result.series[key].steps[-1] for key in (TRAIN_LOSS, study.primary.metric) if key in result.series]
    finished = result.state.status.has_whole_budget
    return Subject(
        arm.name,
        result.seed,
        flatten_values(arm.changes),
        result.resolved,
        result.tags,
        max(logged, default=None) if finished else None,
        budget_in_steps=study.equal_steps,
        compute=_compute(cards[study.baseline], cards[arm.name]),
    )


def _compute(base: ModelCard | None, card: ModelCard | None) -> str:
    """Return an arm's active FLOPs relative to the baseline's; equal within the tolerance of `match`."""
    if base is None or card is None:
        return ""
    more = card.active_flops_per_sample / base.active_flops_per_sample - 1
    text = format_count(base.active_flops_per_sample)
    return text if abs(more) <= FLOPS_TOLERANCE else f"{100 * more:+.1f} % of {text}"


def _ladder(study: Comparison, ladder: Ladder, by_arm: Mapping[str, Sequence[RunResult]]) -> LadderResult:
    primary = study.primary.metric
    done = {rate: {r.seed: r for r in by_arm[arm] if r.state.status.has_result} for rate, arm in ladder.rungs.items()}
    finals = {rate: read_finals(list(runs.values()), study.primary) for rate, runs in done.items()}
    per_seed: dict[int, float | None] = {}
    for seed in study.seeds:
        if study.primary.direction == "lower" and all(seed in runs for runs in done.values()):
            rungs = {rate: runs[seed] for rate, runs in done.items()}
            losses = {rate: finals[rate][seed].value if seed in finals[rate] else math.nan for rate in rungs}
            per_seed[seed] = sensitivity(losses, _or_nan(next(iter(rungs.values())).first(primary)))
    stable = {rate: sum(not r.state.status.is_failed_result for r in runs.values()) for rate, runs in done.items()}
    total = {rate: len(runs) for rate, runs in done.items()}
    return LadderResult(
        ladder,
        mean_of(list(per_seed.values())),
        {rate: mean_of([final.value for final in runs.values()]) for rate, runs in finals.items()},
        stable,
        total,
        # a rate whose runs all crashed, or are still to come, is unknown: what is stable ends below it
        largest_stable({rate: 0 < total[rate] == stable[rate] for rate in done}),
        {arm: seeds for rate, arm in ladder.rungs.items() if (seeds := _missing(study.seeds, done[rate]))},
        {seed: value for seed, value in per_seed.items() if value is not None},
    )


def _missing(seeds: Sequence[int], having: Collection[int]) -> tuple[int, ...]:
    return tuple(seed for seed in seeds if seed not in having)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _survival(results: Sequence[RunResult]) -> dict[int, bool]:
    """Return whether each run with a result survived, by seed."""
    return {r.seed: r.state.status is Status.FINISHED for r in results if r.state.status.has_result}


def _values(finals: Mapping[int, Final]) -> dict[int, float]:
    return {seed: final.value for seed, final in finals.items()}


def _failed(finals: Mapping[int, Final]) -> set[int]:
    return {seed for seed, final in finals.items() if final.failed}


def _by_term(results: Sequence[RunResult], family: metric_keys.MetricKey) -> dict[str, Mean]:
    """Return the last validation value of every term in a `{stage}/..._{term}` family."""
    terms: dict[str, list[float | None]] = {}
    for result in results:
        for key in result.series:
            parts = family.match(key)
            if parts and parts["stage"] == "val":
                terms.setdefault(parts["term"], []).append(result.last(key))
    return {term: mean for term, values in sorted(terms.items()) if (mean := mean_of(values))}
