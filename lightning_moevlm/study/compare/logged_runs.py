"""Makes a comparison of any runs in MLflow: the arm, seed and state of each.

Runs with the same tag `arm` form an arm. Without the tag, runs with equal configurations do, seeds aside; or, if keys
are named, runs that agree in these. The seed is the tag `seed`, else `seed_everything`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.flat_config import flatten, flatten_values, unflatten
from lightning_moevlm.common.nearest_name import suggest
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.fairness import Weight
from lightning_moevlm.study.compare.named_arms import NamedRun, key_difference, name_arms
from lightning_moevlm.study.compare.results import RunResult, StudyResult
from lightning_moevlm.study.declare.comparison import (
    Arm,
    Comparison,
    Correction,
    Decision,
    Direction,
    Divergence,
    Guard,
    Primary,
)
from lightning_moevlm.study.declare.did_not_learn import read_words
from lightning_moevlm.study.run.ledger import RunState, Status
from lightning_moevlm.study.run.mlflow_runs import OUTCOME
from lightning_moevlm.study.statistics.outcomes.divergence import NONFINITE_STEP, explain_divergence
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.read.run_selection import name_run
from lightning_moevlm.tracking.read.runs import RunRow
from lightning_moevlm.tracking.read.series import Series

NAME = "comparison"
_TASK_LOSS = metric_keys.TASK_LOSS.key(stage="val")
_STATUSES = {"RUNNING": Status.RUNNING, "SCHEDULED": Status.PLANNED, "FINISHED": Status.FINISHED}


@dataclass(frozen=True)
class Rules:
    """The rules of a comparison; fields without a comment are those of `Comparison`."""

    metric: str
    direction: Direction | None = None
    """None: the metric's declared direction."""
    within: float | None = None
    baseline: str | None = None
    by: tuple[str, ...] = ()
    """Config keys or tags that define the arms."""
    also: tuple[str, ...] = ()
    guard: tuple[tuple[str, float], ...] = ()
    """Metric, and by how much it may get worse."""
    correction: Correction = "holm"
    did_not_learn: Mapping[str, str] = field(default_factory=dict)
    """Keys and values of the rule as a study file has them, as texts; empty: no rule."""


def read_runs(rows: Sequence[RunRow]) -> list[NamedRun]:
    """Return runs with their configs and seeds.

    Raises:
        UserError: A run has no seed.
    """
    read = []
    for row in rows:
        config = unflatten(row.params)
        seed = row.tags.get("seed", str(config.get("seed_everything")))
        if not seed.isdigit():
            raise UserError(
                f"run {name_run(row)} has no seed (a tag `seed` or a numeric param `seed_everything`), but runs are "
                "paired by seed. Set the tag in MLflow, or leave the run out"
            )
        read.append(NamedRun(row, config, int(seed)))
    return read


def refuse_unchecked(runs: Sequence[NamedRun]) -> None:
    """Refuse runs without a configuration, whose fairness cannot be checked.

    Raises:
        UserError: A run has logged no configuration.
    """
    for one in runs:
        if not {"data", "trainer"} <= one.config.keys():
            raise UserError(
                f"run {name_run(one.row)} has logged no configuration (params like trainer.max_steps and "
                "data.batch_size), so its fairness cannot be checked. Leave it out, or compare it anyway: "
                "--unfair=true"
            )


def comparison_of_runs(
    runs: Sequence[NamedRun], series: Mapping[str, Mapping[str, Series]], rules: Rules
) -> tuple[Comparison, list[RunResult]]:
    """Return the comparison, and every run of it.

    Args:
        runs: The first one's arm is the baseline, unless the rules name another.
        series: By run id and key.
        rules: Of the comparison.

    Raises:
        UserError: The runs make fewer than two arms, or two runs are of one arm and seed, or one arm's runs are unlike;
            the baseline is missing, or a rule stopped it; an ended run has not logged the metric.
    """
    arms = name_arms(runs, rules.by)
    logged = {key for one in runs for key in series[one.row.run_id]}
    primary = Primary(rules.metric, _direction(rules.metric, rules.direction, logged))
    guard = tuple(Guard(metric, _direction(metric, None, logged), at_most) for metric, at_most in rules.guard)
    for key in (*rules.also, *(one.metric for one in guard)):
        if key not in logged:
            raise UserError(f"no run has logged {key}; {suggest(key, logged)}leave it out or take another")
    baseline = _baseline(arms, rules)
    # A loss that ends above the untrained model's is a divergence; other metrics have no such rule.
    rule = Divergence(_TASK_LOSS, times_untrained=1.0)
    results = [
        RunResult(
            arm, one.seed, one.config, _max_steps(one.config), _state(one.row, series[one.row.run_id], rule),
            series[one.row.run_id], one.row.tags,
        )
        for arm, mine in arms.items()
        for one in mine
    ]  # fmt: skip
    _refuse_without(rules.metric, runs, results)
    if any(r.state.status is Status.STOPPED for r in results if r.arm == baseline):
        raise UserError(
            f"arm {baseline!r} was stopped early by its study's rule, so it cannot be the baseline. Name another."
        )
    title, _ = name_and_unit(rules.metric)
    declared = tuple(Arm(name, "", _read_declared(mine[0], rules.by)) for name, mine in arms.items())
    return (
        Comparison(
            name=NAME,
            question=f"How do these {len(arms)} arms compare in {title}?",
            hypothesis="",
            source="",
            baseline=baseline,
            arms=declared,
            seeds=tuple(sorted({one.seed for one in runs})),
            spends=_spends(results),
            equal_steps=True,
            primary=primary,
            also=rules.also,
            diverged=rule,
            did_not_learn=read_words(rules.did_not_learn, "--did_not_learn", primary, baseline, declared)
            if rules.did_not_learn
            else None,
            decide=Decision(within=rules.within, correction=rules.correction),
            guard=guard,
        ),
        results,
    )


def describe_changes(result: StudyResult) -> dict[str, dict[str, str]]:
    """Return the differences of each arm's configuration from the baseline's, by arm and key."""
    first = {arm.arm.name: arm.runs[0].resolved for arm in result.arms}
    base = first[result.comparison.baseline]
    return {name: key_difference(base, config) for name, config in first.items()}


def suggest_remedy(result: StudyResult) -> str:
    """Return what to do about runs that are not alike, with the keys that `--by` needs."""
    changed = dict.fromkeys(key for arm in describe_changes(result).values() for key in arm)
    runs = [run for arm in result.arms for run in arm.runs]
    logged = {key for run in runs for key in flatten(run.resolved)}
    keys = dict.fromkeys(key for arm in result.arms for key in arm.arm.changes)  # what `--by` has named already
    for one in (one for one in result.unlike if one.weight is Weight.BIASES):
        differing = [key for key in changed if any(_is_below(key, mine) for mine in one.keys)]
        # Runs may differ without a key of theirs: a limit in batches counts other samples if batches have another size.
        keys |= dict.fromkeys(differing or [mine for mine in one.keys if any(_is_below(key, mine) for key in logged)])
    if all("arm" in run.tags for run in runs) and keys:
        keys = {"arm": None} | keys
    named = " ".join(f"--by {key}" for key in keys)
    return (
        "Compare runs that are alike. "
        + (f"If arms are meant to differ in it, add {named}. " if keys else "")
        + "To compare them anyway: --unfair=true"
    )


def _is_below(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


def _direction(name: str, asked: Direction | None, logged: Collection[str]) -> Direction:
    metric = metric_keys.find_metric(name)
    word = asked or (metric.better if metric else "neither")
    if word == "neither":
        hint = "" if name in logged else f"no run has logged it; {suggest(name, logged)}"
        raise UserError(
            f"it is not declared whether lower or higher {name} is better; {hint}make it the --metric with --direction "
            "lower or --direction higher, or guard another"
        )
    return "lower" if word == "lower" else "higher"


def _baseline(arms: Mapping[str, Sequence[NamedRun]], rules: Rules) -> str:
    name = rules.baseline or next(iter(arms))
    if name not in arms:
        raise UserError(f"--baseline {name}: there is no such arm; {suggest(name, arms)}arms: {', '.join(arms)}")
    if len(arms) < 2:
        raise UserError(
            f"all {len(arms[name])} runs belong to arm {name!r}. Add runs of another arm, or name the key or tag that "
            "distinguishes arms: --by KEY"
        )
    return name


def _read_declared(run: NamedRun, by: Sequence[str]) -> dict[str, Any]:
    """Return the values of the keys that define the arms."""
    return {key: run.value(key) for key in by if run.has_config(key)}


def _max_steps(config: Mapping[str, Any]) -> int | None:
    steps = flatten_values(config).get("trainer.max_steps")
    return steps if isinstance(steps, int) and steps > 0 else None


def _state(row: RunRow, series: Mapping[str, Series], rule: Divergence) -> RunState:
    """Return a run's state: its study's judgement, else from MLflow and from its points."""
    ended = None if row.end_ms is None else row.end_ms / 1000
    state = RunState(_STATUSES.get(row.status, Status.FAILED), row.run_id, started=row.start_ms / 1000, ended=ended)
    judged = row.tags.get(OUTCOME)
    if judged in [str(status) for status in Status]:
        return replace(state, status=Status(judged))
    if state.status in (Status.RUNNING, Status.PLANNED):
        return state
    points = [
        Point(key, step, value, 0)
        for key in (rule.metric, NONFINITE_STEP)
        if key in series
        for step, value in zip(series[key].steps, series[key].values, strict=True)
    ]
    why = explain_divergence(points, rule)
    return replace(state, status=Status.DIVERGED, reason=why) if why else state


def _refuse_without(metric: str, runs: Sequence[NamedRun], results: Sequence[RunResult]) -> None:
    for result in results:
        if result.state.status is Status.FINISHED and metric not in result.series:
            row = next(one.row for one in runs if one.row.run_id == result.state.run_id)
            offered = suggest(metric, result.series) or (
                "it has logged nothing; " if not result.series else f"it has logged {len(result.series)} others; "
            )
            raise UserError(
                f"run {name_run(row)} has logged no {metric}; {offered}leave it out or take another --metric"
            )


def _spends(results: Sequence[RunResult]) -> str:
    steps = sorted({r.max_steps for r in results if r.max_steps is not None})
    if not steps:
        return "an unknown number of steps"
    return f"{steps[0]} steps" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps"
