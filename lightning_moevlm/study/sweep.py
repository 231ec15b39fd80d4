"""Carries a declared study through: plan its runs, train what is missing, show their state, answer with a report.

Resolving configurations, building models and opening data need folders above this one; `Builders` hands them in.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.shipped_files import describe_missing_file, find_file
from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.baseline_pin import keep_baseline, refuse_other_baseline
from lightning_moevlm.study.plan.plan_study import Describe, Resolve, plan_study
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.plan.selection import select
from lightning_moevlm.study.run.engines import JOBS_FOLDER, Engine, LocalEngine
from lightning_moevlm.study.run.ledger import STATE_FILE, Status, check_store, hold_study, read_ledger, remember_store
from lightning_moevlm.study.run.mlflow_runs import StudyRuns, find_tracking_uri, open_experiment
from lightning_moevlm.study.run.processes.command_line import run_options, training_command
from lightning_moevlm.tracking.store import has_store, prepare_store

if TYPE_CHECKING:  # what is not needed to read a study is imported where it is used: it takes a second
    from rich.console import Console

    from lightning_moevlm.study.compare.known_runs import KnownRuns
    from lightning_moevlm.study.report.tables.table import Table
    from lightning_moevlm.study.run.probe import Probe

Listing = tuple[Sequence["Table"], Sequence[Mapping[str, object]]]
"""Tables for people, and the same as records."""

_REPORT_FOLDER = "report"


class Data(Protocol):
    """A data module, as far as a study needs it."""

    @property
    def manifest_digest(self) -> str:
        """Digest of the manifests that it reads."""

    def prepare_data(self) -> None:
        """Check that its shards are there.

        Raises:
            UserError: They are not.
        """


@dataclass(frozen=True)
class Builders:
    """Functions of the folders above."""

    resolve: Resolve  # gives the whole configuration of files and overrides
    describe: Describe  # gives the model card of a whole configuration
    build_data: Callable[[Mapping[str, Any]], Data]  # gives the data module of the section `data`


def plan(file: str, builders: Callable[[], Builders], only: Sequence[str] = ()) -> Plan:
    """Read, resolve and check a study, or the part of it that `only` names.

    Args:
        file: The study file, or the name of a shipped one.
        builders: Called once the file has been read: importing Lightning takes seconds.
        only: Each `arm=NAME[,NAME]` or `seed=NUMBER[,NUMBER]`.

    Raises:
        UserError: A mistake in the file or in a configuration.
    """
    found = find_file(Path(file))
    if found is None and Path(file).is_dir():
        raise UserError(f"{file} is a folder; give a study file in it. `sweep run` and `sweep matrix` take a folder")
    if found is None:
        raise describe_missing_file("study file", Path(file))
    study, make = read_study(found), builders()
    planned = plan_study(study, make.resolve, make.describe)
    refuse_other_baseline(planned)
    return select(planned, only)


def list_plan(planned: Plan, builders: Callable[[], Builders], probe: bool) -> Listing:
    """Return every run with its difference from the base; probe: also with the time it would take here."""
    from lightning_moevlm.study.report.plan_records import plan_records
    from lightning_moevlm.study.report.tables.plan_tables import arms_table, plan_table

    statuses = {run.folder: str(state.status) for run, state in read_ledger(planned)}
    probes = _probe(planned, builders()) if probe else {}
    known = _look_for_known_runs(planned, builders())
    records = plan_records(planned, statuses, probes, known)
    return (arms_table(planned, probes), plan_table(planned, statuses, known)), records


def run(
    planned: Plan,
    builders: Callable[[], Builders],
    terminal: "Console",
    engine: Engine,
    jobs: int | None,
    timeout_minutes: float | None,
    only: Sequence[str] = (),
    retry: bool = False,
    reuse: bool = True,
    retrain: bool = False,
) -> int:
    """Train what is missing, then report; return an exit code. `moevlm sweep run --help` explains the options.

    Raises:
        UserError: A mistake that is found before anything is written, or a ledger that cannot be written.
    """
    from lightning_moevlm.study.compare.other_code import describe_other_code, find_other_code, replace_runs
    from lightning_moevlm.study.run.active_runs import UNREACHABLE
    from lightning_moevlm.study.run.to_do import find_waiting_runs

    file, selected = planned.study.file, select(planned, only)
    if retrain or not all(state.status.is_settled for _, state in read_ledger(selected)):
        _check_data(selected, builders())
    uri = _open_store(planned)
    with hold_study(planned.folder):
        experiment = open_experiment(uri, planned.comparison.name)
        remember_store(planned.folder, uri)
        keep_baseline(planned)
        found = find_other_code(selected, uri)
        for line in replace_runs(experiment, found) if retrain else describe_other_code(selected, found):
            _print(terminal, line)
        taken = _reuse_known_runs(selected, experiment, terminal, builders()) if reuse else 0
        waiting = find_waiting_runs(selected, experiment, engine, retry)
        if waiting:
            stopped = _execute(selected, experiment, waiting, terminal, engine, jobs, timeout_minutes)
            if stopped:
                words = "".join(f" --only {each}" for each in only)
                if engine.name != LocalEngine.name:
                    words += f" --engine {engine.name}, with the options that it had"
                _print(terminal, f"Stopped by {stopped}. The state is kept. Resume: moevlm sweep run {file}{words}")
                return 1 if stopped == UNREACHABLE else 130
        failed = [run.name for run, state in read_ledger(selected) if state.status is Status.FAILED]
        total = len(selected.runs)
        if not waiting and not failed:
            _print(terminal, f"Nothing left to do: all {total} runs have results.")
        answer(planned, experiment, terminal, redraw=bool(waiting or taken))
    if failed:
        terminal.print(f"[red]{len(failed)} of {total} runs failed[/]: {', '.join(failed)}", highlight=False)
        _print(terminal, "The report shows the last lines of their logs.")
        _print(terminal, f"Once the cause is gone: moevlm sweep run {file} --retry=true")
    return 1 if failed else 0


def list_states(planned: Plan, only: Sequence[str] = ()) -> Listing:
    """Return the state of every selected run, after uploading what runs kept on disk. only: as for `plan`."""
    from lightning_moevlm.study.compare.run_states import judge_states
    from lightning_moevlm.study.report.plan_records import status_records
    from lightning_moevlm.study.report.tables.plan_tables import status_table

    _upload_offline_logs(planned)
    selected = select(planned, only)
    ledger, notes = judge_states(planned, read_ledger(planned), find_tracking_uri(planned))
    shown = [(run, state) for run, state in ledger if run in selected.runs]
    notes = (*notes, *_look_for_other_code(selected))
    return (status_table(selected, shown, notes),), status_records(selected, shown)


def report(planned: Plan, terminal: "Console", unfair: bool, full: bool) -> None:
    """Print the finding and write the report.

    Raises:
        UserError: Nothing has run, or runs are not alike and `unfair` is false.
    """
    answer(planned, settle(planned), terminal, redraw=True, unfair=unfair, full=full)


def list_results(planned: Plan, kind: str | None, unfair: bool) -> Sequence[Mapping[str, object]]:
    """Return the records of a kind; by default factors if the design crosses them, else arms.

    Raises:
        UserError: As `report`.
    """
    from lightning_moevlm.study.compare.collect_results import collect_results
    from lightning_moevlm.study.compare.fairness import refuse_biased
    from lightning_moevlm.study.report.result_records import make_records

    experiment = settle(planned)
    result = collect_results(planned, read_ledger(planned), experiment.uri)
    kind = kind or ("factors" if result.factors else "arms")
    if not unfair and kind in ("arms", "factors"):
        refuse_biased(planned.comparison.name, result.unlike, _advise_rerun(planned))
    return dict(make_records(result))[kind]  # type: ignore[index]  # the command line allows its keys alone


def settle(planned: Plan) -> StudyRuns:
    """Return the study's runs, after uploading what they kept on disk and judging those that have ended."""
    from lightning_moevlm.study.run.outcome import judge_ended

    name, ledger = planned.comparison.name, read_ledger(planned)
    if all(state.run_id is None for _, state in ledger):
        raise UserError(f"nothing of {name} has run yet; start it with `moevlm sweep run {planned.study.file}`")
    experiment = open_experiment(_open_store(planned), name)
    _upload_offline_logs(planned)
    if any(state.status is Status.ENDED for _, state in ledger):
        with hold_study(planned.folder):
            judge_ended(planned, experiment, experiment.ids())
    return experiment


def answer(
    planned: Plan,
    experiment: StudyRuns,
    terminal: "Console",
    redraw: bool,
    unfair: bool = False,
    full: bool = False,
) -> None:
    """Print the finding; draw and write the report unless it is newer than every run and the study file."""
    from lightning_moevlm.study.compare.collect_results import collect_results
    from lightning_moevlm.study.compare.fairness import refuse_biased
    from lightning_moevlm.study.report.make_report import describe_origin, make_report, print_answer
    from lightning_moevlm.study.report.mlflow_summary import log_summary
    from lightning_moevlm.study.report.mlflow_view import describe_view, log_view
    from lightning_moevlm.study.report.write_report import HTML_FILE, write_report

    result = collect_results(planned, read_ledger(planned), experiment.uri)
    if not unfair:
        refuse_biased(planned.comparison.name, result.unlike, _advise_rerun(planned))
    folder, view = planned.folder / _REPORT_FOLDER, describe_view(experiment)
    page = folder / HTML_FILE
    sources = [planned.study.file, *(planned.run_folder(run) / STATE_FILE for run in planned.runs)]
    newest = max(source.stat().st_mtime for source in sources if source.exists())
    if redraw or not page.exists() or page.stat().st_mtime < newest:
        whole = make_report(describe_origin(planned, result, view), result)
        with explain_write_errors(folder, "free disk space, or grant write permission"):
            write_report(whole, folder)
        log_summary(experiment, whole, folder)
        log_view(experiment, result)
    print_answer(terminal, result, full)
    _print(terminal, f"Report with curves, stability, costs and all tables: {page.absolute()}")
    _print(terminal, "Charts of all runs in MLflow, grouped by arm:")
    for line in view:
        _print(terminal, f"    {line}")


def _advise_rerun(planned: Plan) -> str:
    return (
        f"To train runs again, delete them in MLflow (`moevlm sweep status {planned.study.file}` shows their ids) and "
        f"repeat `moevlm sweep run {planned.study.file}`. Or compare them all the same: `moevlm sweep report ... "
        "--unfair=true`"
    )


def _execute(
    planned: Plan,
    experiment: StudyRuns,
    waiting: Sequence[PlannedRun],
    terminal: "Console",
    engine: Engine,
    jobs: int | None,
    timeout_minutes: float | None,
) -> str:
    """Run what waits, behind a bar; return the name of the signal that stopped it, or ""."""
    from lightning_moevlm.study.run.execute import execute
    from lightning_moevlm.study.run.progress_bar import SweepProgress

    def command(overrides: Path, run_id: str, checkpoint: Path | None) -> list[str]:
        return [*training_command(planned.study.base, overrides), *run_options(run_id, checkpoint)]

    total = len(planned.runs)
    at_once = engine.open(planned.folder / JOBS_FOLDER, jobs, len(waiting))
    try:
        head = f"{planned.comparison.name}: {total} runs, {len(waiting)} to do, {at_once} at a time"
        _print(terminal, f"{head}, engine {engine.name}")
        with SweepProgress(terminal, total, total - len(waiting), at_once) as progress:
            tally = execute(planned, experiment, waiting, command, progress, engine, at_once, timeout_minutes)
    finally:
        engine.close()
    return tally.stopped


def _open_store(planned: Plan) -> str:
    """Return the tracking URI in force, after checking that it answers and that it is the study's own."""

    uri = find_tracking_uri(planned)
    check_store(planned.folder, uri)
    prepare_store(uri)
    return uri


def _upload_offline_logs(planned: Plan) -> None:
    """Upload what the study's runs kept on disk while MLflow was unreachable; report it on standard error."""
    from rich.console import Console

    from lightning_moevlm.study.run.store_retries import upload_offline_logs

    ids = [state.run_id for _, state in read_ledger(planned) if state.run_id is not None]
    terminal = Console(stderr=True)
    for log, pending, reason in upload_offline_logs(find_tracking_uri(planned), ids):
        outcome = f"kept, {reason}" if reason else "uploaded"
        _print(
            terminal,
            f"run {log.address.run_id}, {pending.points} points and {pending.files} files on disk: {outcome}",
        )


def _probe(planned: Plan, builders: Builders) -> "dict[str, Probe]":
    """Time each arm, behind a bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from lightning_moevlm.study.run.probe import probe_arms

    _check_data(planned, builders)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("probe", total=len(planned.comparison.arms))
        started = iter(range(len(planned.comparison.arms)))

        def tick(arm: str) -> None:
            bar.update(task, description=f"probe {arm}", completed=next(started))

        return probe_arms(planned, lambda overrides: training_command(planned.study.base, overrides), tick)


def _check_data(planned: Plan, builders: Builders) -> None:
    """Look at every set of shards that the runs name: a missing one is reported once, not by every run."""
    checked: list[object] = []
    for each in planned.runs:
        data = {name: value for name, value in each.resolved["data"].items() if name != "seed"}
        if data not in checked:
            checked.append(data)
            builders.build_data(data).prepare_data()


def _look_for_known_runs(planned: Plan, builders: Builders) -> "KnownRuns | None":
    """Return what `sweep run` would take; None if the store or the data cannot be read. Writes nothing."""
    from lightning_moevlm.study.compare.known_runs import find_known

    try:
        uri = _find_store(planned)
        return None if uri is None else find_known(planned, uri, _digest_once(builders))
    except UserError:  # `sweep run`, which needs both, reports it
        return None


def _look_for_other_code(planned: Plan) -> tuple[str, ...]:
    """Return the lines on runs that were trained with other code; none if the store cannot be read."""
    from lightning_moevlm.study.compare.other_code import describe_other_code, find_other_code

    if not any(state.status.is_settled for _, state in read_ledger(planned)):
        return ()
    try:
        uri = _find_store(planned)
    except UserError:
        return ("MLflow cannot be read: the code of the runs was not compared with today's",)
    return () if uri is None else describe_other_code(planned, find_other_code(planned, uri))


def _find_store(planned: Plan) -> str | None:
    """Return the tracking URI if there is a store; creates none.

    Raises:
        UserError: The store cannot be read.
    """
    uri = find_tracking_uri(planned)
    if not has_store(uri):
        return None
    prepare_store(uri)
    return uri


def _reuse_known_runs(planned: Plan, experiment: StudyRuns, terminal: "Console", builders: Builders) -> int:
    """Take finished runs of other studies, say so, and return their number. Call it holding the study."""
    from lightning_moevlm.study.compare.known_runs import find_known, take_known

    known = find_known(planned, experiment.uri, _digest_once(builders))
    taken = take_known(planned, experiment, known)
    for line in known.describe(len(planned.runs)):
        _print(terminal, line)
    if taken:
        _print(terminal, "Known runs are not trained again. --reuse=false trains them here.")
    return len(taken)


def _digest_once(builders: Builders) -> Callable[[Mapping[str, Any]], str]:
    """Return a function from a data configuration to the digest of what it reads; each is read once."""
    digests: dict[str, str] = {}

    def digest(data: Mapping[str, Any]) -> str:
        key = json.dumps(data, sort_keys=True, default=str)
        if key not in digests:
            digests[key] = builders.build_data(data).manifest_digest
        return digests[key]

    return digest


def _print(terminal: "Console", line: str) -> None:
    terminal.print(line, highlight=False, soft_wrap=True, markup=False)
