"""Collects the metrics of runs from MLflow, groups them by arm and compares the arms with the baseline.

Only runs with a result (finished or diverged) enter comparisons. Unfinished runs are drawn, not counted.
"""

import math
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType

from msgspec import structs

from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.model_card import ModelCard
from lightning_moevlm.study.compare.fairness import Subject, find_differences
from lightning_moevlm.study.compare.results import (
    ArmResult,
    LadderResult,
    Mean,
    RunResult,
    StudyResult,
    list_also,
    make_rule,
    mean_of,
    read_finals,
)
from lightning_moevlm.study.declare.comparison import Arm, Comparison
from lightning_moevlm.study.plan.plan_checks import FLOPS_TOLERANCE
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.report.tables.table import format_count
from lightning_moevlm.study.run.ledger import RunState, Status
from lightning_moevlm.study.run.mlflow_runs import ROLE, ROLE_ARM
from lightning_moevlm.study.statistics.effects import (
    Effect,
    Lost,
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
from lightning_moevlm.study.statistics.futility import STOPPED_RULE, find_withdrawals, withhold_verdict
from lightning_moevlm.study.statistics.lr_sensitivity import Ladder, find_ladders, largest_stable, sensitivity
from lightning_moevlm.study.statistics.outcomes.arm_stability import summarise_stability
from lightning_moevlm.study.statistics.outcomes.stability import TRAIN_LOSS, measure_stability
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
    """
    withdrawn = _find_withdrawn(study, results)
    results = [_mark_stopped(r) if r.arm in withdrawn else r for r in results]
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
        [r.state.status is Status.FINISHED for r in done],
    )
    equal = _by_arm(budgets, done)
    arms = tuple(
        _arm_result(study, cards, arm, by_arm[arm.name], base, judged.get(arm.name), equal.get(arm.name, {}))
        for arm in study.arms
    )
    return StudyResult(
        study,
        arms,
        unlike=find_differences([_subject(study, cards, r) for r in done]),
        budgets={budget.what: budget.spent for budget in budgets},
        ladders=tuple(
            _ladder(study, ladder, by_arm)
            for ladder in find_ladders({arm: runs[0].resolved for arm, runs in by_arm.items() if runs})
        ),
        factors=_factors(study, rule, by_arm),
    )


def _find_withdrawn(study: Comparison, results: Sequence[RunResult]) -> dict[str, str]:
    """Return the reason of each withdrawn arm: the rule now, or the one that stopped one of its runs."""
    now = find_withdrawals(study, ((r.arm, r.seed, r.series.get(study.primary.metric)) for r in results))
    before = {
        r.arm: f"stopped by rule: {r.tags.get(STOPPED_RULE, 'not logged')}"
        for r in results
        if r.state.status is Status.STOPPED
    }
    return before | {name: found.text for name, found in now.items()}


def _mark_stopped(result: RunResult) -> RunResult:
    """Return a run of a withdrawn arm as stopped, also if it reached its end."""
    if result.state.status is not Status.FINISHED:
        return result
    return replace(result, state=structs.replace(result.state, status=Status.STOPPED))


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
    sign = 1 if study.primary.direction == "lower" else -1
    is_withdrawn = effect is not None and effect.verdict is Verdict.STOPPED_EARLY
    stable, total = _count(base, Status.FINISHED), sum(r.state.status.has_result for r in base)
    return ArmResult(
        arm=arm,
        card=cards[arm.name],
        runs=runs,
        final=mean_of([r.last(primary) for r in done]),
        untrained=mean_of([r.first(primary) for r in done]),
        learned=sum(_has_improved(r, primary, sign) for r in done),
        effect=effect,
        accuracy=_by_term(done, metric_keys.ACCURACY),
        majority=_by_term(done, metric_keys.MAJORITY_ACCURACY),
        also={key: mean for key in list_also(study) if (mean := mean_of([r.last(key) for r in done]))},
        stability=summarise_stability(
            [measure_stability(r.series, r.state.status is Status.DIVERGED, _cost(cards, r).tokens) for r in done],
            _count(runs, Status.DIVERGED),
            # a withdrawn arm has a result only of runs that diverged: not a sample
            None if arm.name == study.baseline or is_withdrawn else (stable, total),
        ),
        equal=equal,
        samples_per_second=mean_of([measure_throughput(r) for r in done]),
        seconds=mean_of([r.state.seconds for r in done]),
        finished=_count(runs, Status.FINISHED),
        diverged=_count(runs, Status.DIVERGED),
        failed=_count(runs, Status.FAILED),
        planned=len(runs),
    )


def _has_improved(result: RunResult, key: str, sign: int) -> bool:
    first, last = result.first(key), result.last(key)
    return first is not None and last is not None and sign * last < sign * first


def _effect(study: Comparison, rule: Rule, runs: Sequence[RunResult], base: Sequence[RunResult]) -> Effect:
    return compare_paired(
        arm=read_finals(runs, study.primary.metric),
        baseline=read_finals(base, study.primary.metric),
        seeds=study.seeds,
        rule=rule,
        arm_lost=_lost(runs, _ended(base)),
        baseline_lost=_lost(base, _ended(runs)),
        guards=_guards(study, runs, base),
    )


def _factors(study: Comparison, rule: Rule, by_arm: Mapping[str, Sequence[RunResult]]) -> tuple[FactorEffect, ...]:
    """Return main effects and interactions, where the design crosses factors."""
    crossing = find_crossing(study.design, {arm.name: arm.levels for arm in study.arms})
    if crossing is None:
        return ()
    values = {name: read_finals(runs, study.primary.metric) for name, runs in by_arm.items()}
    ended = set(study.seeds).intersection(*map(_ended, by_arm.values()))
    return factor_effects(
        values, crossing, study.seeds, rule, {name: _lost(runs, ended) for name, runs in by_arm.items()}
    )


def _guards(study: Comparison, runs: Sequence[RunResult], base: Sequence[RunResult]) -> tuple[GuardResult, ...]:
    primary = study.primary.metric
    compared = tuple(pair_differences(read_finals(runs, primary), read_finals(base, primary), study.seeds))
    return tuple(
        check_guard(
            guard.metric,
            read_finals(runs, guard.metric),
            read_finals(base, guard.metric),
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
            mean = mean_of([v for r, v in zip(done, budget.values, strict=True) if r.arm == arm])
            if mean:
                arms.setdefault(arm, {})[budget.what] = mean
    return arms


def _subject(study: Comparison, cards: Cards, result: RunResult) -> Subject:
    arm = next(arm for arm in study.arms if arm.name == result.arm)
    logged = [result.series[key].steps[-1] for key in (TRAIN_LOSS, study.primary.metric) if key in result.series]
    finished = result.state.status is Status.FINISHED
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
    per_seed = []
    for seed in study.seeds:
        if study.primary.direction == "lower" and all(seed in runs for runs in done.values()):
            rungs = {rate: runs[seed] for rate, runs in done.items()}
            losses = {rate: math.nan if _diverged(r) else _or_nan(r.last(primary)) for rate, r in rungs.items()}
            per_seed.append(sensitivity(losses, _or_nan(next(iter(rungs.values())).first(primary))))
    stable = {rate: sum(not _diverged(r) for r in runs.values()) for rate, runs in done.items()}
    total = {rate: len(runs) for rate, runs in done.items()}
    return LadderResult(
        ladder,
        mean_of(per_seed),
        {rate: mean_of([r.last(primary) for r in runs.values()]) for rate, runs in done.items()},
        stable,
        total,
        # a rate whose runs all crashed, or are still to come, is unknown: what is stable ends below it
        largest_stable({rate: 0 < total[rate] == stable[rate] for rate in done}),
        {arm: seeds for rate, arm in ladder.rungs.items() if (seeds := _missing(study.seeds, done[rate]))},
    )


def _missing(seeds: Sequence[int], having: Collection[int]) -> tuple[int, ...]:
    return tuple(seed for seed in seeds if seed not in having)


def _diverged(result: RunResult) -> bool:
    return result.state.status is Status.DIVERGED


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _ended(results: Sequence[RunResult]) -> set[int]:
    """Return the seeds of the runs that have a result or crashed."""
    return {r.seed for r in results if r.state.status.has_result or r.state.status is Status.FAILED}


def _lost(results: Sequence[RunResult], paired: Set[int]) -> Lost:
    """Return the lost runs. paired: seeds for which the other side has an ended run, too."""
    unpaired = [r for r in results if r.seed not in paired]
    counted = (_count(results, Status.DIVERGED), _count(results, Status.FAILED))
    return Lost(*counted, unpaired=_count(unpaired, Status.DIVERGED) + _count(unpaired, Status.FAILED))


def _by_term(results: Sequence[RunResult], family: metric_keys.MetricKey) -> dict[str, Mean]:
    """Return the last validation value of every term in a `{stage}/..._{term}` family."""
    terms: dict[str, list[float | None]] = {}
    for result in results:
        for key in result.series:
            parts = family.match(key)
            if parts and parts["stage"] == "val":
                terms.setdefault(parts["term"], []).append(result.last(key))
    return {term: mean for term, values in sorted(terms.items()) if (mean := mean_of(values))}


def _count(results: Sequence[RunResult], status: Status) -> int:
    return sum(r.state.status is status for r in results)
