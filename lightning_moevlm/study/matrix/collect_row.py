"""Makes a row of the matrix from the runs of one cure study, each cell as a single comparison."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.compare.collect_results import measure_throughput
from lightning_moevlm.study.compare.judged_runs import judge_learned
from lightning_moevlm.study.compare.results import RunResult, make_rule, peak_memory_of_run, read_finals
from lightning_moevlm.study.declare.comparison import Arm, Comparison
from lightning_moevlm.study.declare.designs.cures import HEALTHY, ILLNESS, SICK
from lightning_moevlm.study.declare.factors import ON
from lightning_moevlm.study.matrix.records import Cell, CellKind, Outcome, Row, SideEffect, StepTime
from lightning_moevlm.study.matrix.signs import find_lead
from lightning_moevlm.study.plan.run_identity import compute_digest
from lightning_moevlm.study.run.ledger import Status
from lightning_moevlm.study.statistics.cures.cure_effect import judge_cell
from lightning_moevlm.study.statistics.cures.damage import judge_damage
from lightning_moevlm.study.statistics.equal_budget import median_after_warm_up
from lightning_moevlm.study.statistics.outcomes.arm_stability import summarise_recovery
from lightning_moevlm.study.statistics.outcomes.stability import TRAIN_LOSS, recovery
from lightning_moevlm.study.statistics.outcomes.survival import Survival
from lightning_moevlm.study.statistics.verdict import Rule
from lightning_moevlm.tracking.read.series import Series

Runs = Sequence[RunResult]
_ALL, _ALL_BUT = f"{SICK}__all", f"{SICK}__all_but_"
_STEADY = 1.25  # slowest by fastest run of an arm, up to which their times are compared
_CPU_SECONDS = metric_keys.CPU_SECONDS.key()


def collect_row(study: Comparison, results: Runs) -> Row:
    """Return the row of a cure study.

    Args:
        study: Arms, seeds and rules; its design is `cures`.
        results: Every run, at most one per arm and seed.
    """
    results, _ = judge_learned(study, results)  # what cannot be judged yet lacks healthy runs: no cell is judged
    by_arm = {arm.name: [run for run in results if run.arm == arm.name] for arm in study.arms}
    rule = replace(make_rule(study), correction="holm")
    finals = {name: read_finals(runs, study.primary) for name, runs in by_arm.items()}
    missing = {name: name_missing(runs) for name, runs in by_arm.items()}
    shared = missing[HEALTHY] + missing[SICK]
    design = study.design
    assert design is not None and design.cure_study is not None, "a cure study"
    named = design.cure_study.fresh_arms
    cells, side_effects = [], []
    for arm in study.arms:
        cures = _cures_on(arm)
        if not cures:
            continue
        if arm.name.startswith(HEALTHY):
            side_effects.append(_side_effect(study, rule, cures[0], by_arm[HEALTHY], by_arm[arm.name]))
            continue
        effect = None
        if not shared and not missing[arm.name]:
            effect = judge_cell(finals[HEALTHY], finals[SICK], finals[arm.name], study.seeds, rule)
        kind = _kind(arm.name, cures)
        outcome = _outcome(study, by_arm[arm.name])
        label, is_named = _label(arm.name, kind, cures), arm.name in named
        cells.append(Cell(arm.name, kind, cures, label, effect, outcome, missing[arm.name], is_named=is_named))
    signs = () if shared else design.cure_study.signs
    return Row(
        illness=study.name,
        question=study.question,
        source=study.source,
        metric=study.primary.metric,
        rule=rule,
        seeds=study.seeds,
        spends=study.spends,
        damage=None if shared else judge_damage(finals[HEALTHY], finals[SICK], study.seeds, rule),
        healthy=_outcome(study, by_arm[HEALTHY]),
        sick=_outcome(study, by_arm[SICK]),
        recommendations=design.cure_study.recommendations,
        signs=tuple(
            find_lead(
                sign,
                _series(by_arm[SICK], sign),
                _series(by_arm[HEALTHY], sign),
                _series(by_arm[SICK], TRAIN_LOSS),
                _series(by_arm[HEALTHY], TRAIN_LOSS),
            )
            for sign in signs
        ),
        cells=tuple(cells),
        side_effects=tuple(side_effects),
        missing=shared,
    )


def name_missing(runs: Runs) -> tuple[str, ...]:
    """Return the names of the runs that still have to run; a crash is not missing."""
    settled = (*(status for status in Status if status.is_settled), Status.FAILED)
    return tuple(run.name for run in runs if run.state.status not in settled)


def _side_effect(study: Comparison, rule: Rule, cure: str, healthy: Runs, cured: Runs) -> SideEffect:
    missing = name_missing([*healthy, *cured])
    before, after = read_finals(healthy, study.primary), read_finals(cured, study.primary)
    return SideEffect(
        cure,
        frozenset(compute_digest(run.resolved) for run in healthy),
        frozenset(compute_digest(run.resolved) for run in cured),
        (study.name,),
        None if missing else judge_damage(before, after, study.seeds, rule).effect,
        _outcome(study, cured),
        _compare_times(cured, healthy),
        _relative([peak_memory_of_run(run) for run in cured], [peak_memory_of_run(run) for run in healthy]),
        missing,
    )


def _outcome(study: Comparison, runs: Runs) -> Outcome:
    survival, alpha = Survival.of(read_finals(runs, study.primary)), study.decide.alpha
    steps = [recovery(run.series.get(TRAIN_LOSS)) for run in runs if run.state.status.has_result]
    is_known = any(one is not None for one in steps)
    return Outcome(survival, survival.interval(alpha), summarise_recovery(steps, alpha), is_known)


def _compare_times(ours: Runs, theirs: Runs) -> StepTime | None:
    """Return the relative wall time of a step, else its relative CPU time; None if neither can be compared.

    Times whose runs of one arm differ by more than `_STEADY` are not compared: other work ran beside some of the runs,
    and a difference between the arms may be due to it.
    """
    clocks: tuple[tuple[Literal["wall", "CPU"], Callable[[RunResult], float | None]], ...] = (
        ("wall", _wall_seconds),
        ("CPU", _cpu_seconds),
    )
    for clock, read in clocks:
        mine, usual = [read(run) for run in ours], [read(run) for run in theirs]
        if _is_steady(mine) and _is_steady(usual) and (more := _relative(mine, usual)) is not None:
            return StepTime(more, clock)
    return None


def _is_steady(times: Sequence[float | None]) -> bool:
    known = [time for time in times if time is not None]
    return not known or max(known) <= _STEADY * min(known)


def _wall_seconds(run: RunResult) -> float | None:
    """Return the seconds per sample of a run."""
    speed = measure_throughput(run)
    return 1 / speed if speed else None


def _cpu_seconds(run: RunResult) -> float | None:
    """Return the CPU seconds per step of a run."""
    return median_after_warm_up(run.series.get(_CPU_SECONDS))


def _relative(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """Return the median of ours relative to the median of theirs, minus 1."""
    mine, usual = ([value for value in values if value is not None] for values in (ours, theirs))
    return statistics.median(mine) / statistics.median(usual) - 1 if mine and usual else None


def _series(runs: Runs, metric: str) -> list[Series]:
    return [run.series[metric] for run in runs if metric in run.series]


def _cures_on(arm: Arm) -> tuple[str, ...]:
    return tuple(here.factor for here in arm.levels if here.level == ON and here.factor != ILLNESS)


def _kind(arm: str, cures: tuple[str, ...]) -> CellKind:
    if arm.startswith(_ALL_BUT):
        return "all_but"
    if arm == _ALL:
        return "all"
    return "alone" if len(cures) == 1 else "together"


def _label(arm: str, kind: CellKind, cures: tuple[str, ...]) -> str:
    if kind == "all":
        return "all"
    return f"all but {arm.removeprefix(_ALL_BUT)}" if kind == "all_but" else " + ".join(cures)
