"""Builds the tables of `sweep plan` and `sweep status`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lightning_moevlm.common.durations import format_duration
from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.study.compare.known_runs import KnownRuns
from lightning_moevlm.study.declare.designs.fraction import Fraction
from lightning_moevlm.study.plan.baseline_pin import baseline_digest
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.plan.solve_arms import describe_solved
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_changes, format_count
from lightning_moevlm.study.run.ledger import RunState
from lightning_moevlm.study.run.probe import NUM_STEPS, Probe
from lightning_moevlm.study.statistics.paired_tests import least_seeds


def status_table(plan: Plan, ledger: Sequence[tuple[PlannedRun, RunState]], notes: Sequence[str] = ()) -> Table:
    """Return the state of every run, with its job if it runs on a cluster; notes: added below."""
    on_cluster = any(state.job for _, state in ledger)
    rows = tuple(
        (
            run.name,
            str(state.status),
            NOTHING if state.seconds is None else format_duration(state.seconds),
            str(state.attempts),
            state.run_id or NOTHING,
            *((state.job or NOTHING,) if on_cluster else ()),
            _explain(state) or NOTHING,
        )
        for run, state in ledger
    )
    counts = Counter(str(state.status) for _, state in ledger)
    total = ", ".join(f"{count} {word}" for word, count in counts.items())
    job = ("job",) if on_cluster else ()
    columns = ("run", "status", "time", "attempts", "MLflow run", *job, "why")
    return Table(plan.comparison.name, columns, rows, (total, *notes))


def arms_table(plan: Plan, probes: Mapping[str, Probe] = MappingProxyType({})) -> Table:
    """Return each arm's differences from the base, the size of its model and, if probed, its times."""
    first = {run.arm: run for run in reversed(plan.runs)}
    minutes = plan.study.budget.minutes
    rows = []
    for arm in plan.comparison.arms:
        card = plan.cards[arm.name]
        sizes = (card.total_parameters, card.active_parameters, card.active_flops_per_sample)
        changes = "\n".join(format_changes(flatten_values(arm.changes)))
        times: tuple[str, ...] = ()
        if probes:
            probe = probes[arm.name]
            times = (f"{1e3 * probe.step:.0f} ms", format_duration(probe.run_seconds(first[arm.name], minutes)))
        rows.append((arm.name, *(format_count(size) for size in sizes), *times, changes or NOTHING))
    timed = ("time/step", "time/run") if probes else ()
    columns = ("arm", "parameters", "active", "active FLOPs/sample", *timed, "difference from the base")
    shared = ", ".join(format_changes(flatten_values(plan.study.all_arms)))
    notes: tuple[str, ...] = (f"all_arms, over the base: {shared}.",) if shared else ()
    notes += describe_solved(plan.comparison, plan.cards)
    if probes:
        total = sum(probes[run.arm].run_seconds(run, minutes) for run in plan.runs)
        notes += (
            f"estimate: {format_duration(total)} for all {len(plan.runs)} runs, one at a time on this machine, "
            f"from {NUM_STEPS} steps of each arm, without tracking and checkpoints.",
        )
    return Table(f"{plan.comparison.name}: {plan.comparison.question}", columns, tuple(rows), notes)


def plan_table(plan: Plan, statuses: dict[str, str], known: KnownRuns | None = None) -> Table:
    """Return every planned run with its digest. statuses: by run folder. known: runs in other studies."""
    taken = known.taken if known else {}
    known_as = {folder: f"known from {one.study}" for folder, one in taken.items()}
    shown = statuses | known_as
    rows = tuple((run.name, run.digest, shown[run.folder], str(plan.run_folder(run))) for run in plan.runs)
    study = plan.comparison
    notes = (
        f"{len(study.arms)} arms x {len(study.seeds)} seeds, {study.spends} each. "
        f"{study.primary.metric} decides, {study.primary.direction} is better.",
        *_notes_on_seeds(plan),
        f"diverged: {study.diverged.text}.",
        *((f"did not learn: {study.did_not_learn.text}.",) if study.did_not_learn else ()),
        *(f"{line}." for line in (known.describe(len(plan.runs)) if known else ())),
        *(("`sweep run` takes the results of known runs. With --reuse=false it trains them again.",) if taken else ()),
        *_notes_on_baseline(plan),
        *_notes_on_length(plan),
        *(line for fraction in _fractions(plan) for line in fraction.describe()),
    )
    return Table("Runs", ("run", "digest", "status", "folder"), rows, notes, essential=3)


def _notes_on_baseline(plan: Plan) -> tuple[str, ...]:
    digest = baseline_digest(plan)
    if digest is None:
        return ()
    if plan.study.pin is not None:
        return (f"baseline: {digest}, pinned.",)
    return (f"baseline: {digest}. `baseline_digest: '{digest}'` in the study file refuses a changed baseline.",)


def _notes_on_seeds(plan: Plan) -> tuple[str, ...]:
    """Return a note if there are too few seeds for any verdict."""
    seeds, decide = len(plan.comparison.seeds), plan.comparison.decide
    least = least_seeds(decide.test, decide.alpha)
    if seeds >= least:
        return ()
    count = "1 seed gives" if seeds == 1 else f"{seeds} seeds give"
    return (f"{count} no interval and no verdict; at least {least} are needed: add to `seeds` in {plan.study.file}.",)


def _notes_on_length(plan: Plan) -> tuple[str, ...]:
    """Return a note on the number of steps if the budget does not fix it."""
    steps = {run.arm: run.max_steps for run in plan.runs}
    if None in steps.values():
        return ("The clock ends the runs. Their number of steps, and so their result, depends on the machine.",)
    if len(set(steps.values())) == 1:
        return () if plan.study.budget.max_steps is not None else (f"{next(iter(steps.values()))} steps each.",)
    return (f"steps: {', '.join(f'{arm} {count}' for arm, count in steps.items())}.",)


def _fractions(plan: Plan) -> tuple[Fraction, ...]:
    return plan.comparison.design.fractions if plan.comparison.design else ()


def _explain(state: RunState) -> str:
    origin = state.taken_from.partition(" ")[0]  # without the id, which is a tag of the run
    return "; ".join(filter(None, (state.reason, f"taken from {origin}" if origin else "")))
