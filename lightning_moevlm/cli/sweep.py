"""`moevlm sweep`: plan, run, watch and report a declared study.

Plain typed functions; the command line makes options of their arguments and help of their docstrings. What they need is
imported when they run.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_moevlm.cli.output import console, show
from lightning_moevlm.cli.parts import new
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.part_checks import refuse_abstract
from lightning_moevlm.study.run.engines import Engine, LocalEngine, RayEngine, SlurmEngine
from lightning_moevlm.study.sweep import answer, run_again

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_moevlm.study.plan.planned_run import Plan
    from lightning_moevlm.study.report.tables.table import Table
    from lightning_moevlm.study.run.mlflow_runs import StudyRuns
    from lightning_moevlm.study.run.probe import Probe
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_moevlm.study.sweep import engine_options, execute_runs, open_store, select_runs, upload_left_behind

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_moevlm.study.compare.known_runs import KnownRuns
    from lightning_moevlm.study.plan.planned_run import Plan
    from lightning_moevlm.study.run.mlflow_runs import StudyRuns

_ENGINES = {engine.name: engine.__name__ for engine in (LocalEngine, SlurmEngine, RayEngine)}


def plan(file: str, json: str | None = None, probe: bool = False, only: list[str] | None = None) -> None:
    """Show and check every run of a study and its difference from the base, without training.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        json: Write the rows to this file as JSON; - is standard output.
        probe: Train a few steps of each arm here and estimate the time of the study.
        only: Runs to show, arm=NAME[,NAME] or seed=NUMBER; may be repeated; a run must then match every name.
    """
    from lightning_moevlm.study.report.plan_records import plan_records
    from lightning_moevlm.study.report.tables.plan_tables import arms_table, plan_table
    from lightning_moevlm.study.run.ledger import read_ledger

    planned = _plan(file, only)
    statuses = {run.folder: str(state.status) for run, state in read_ledger(planned)}
    probes = _probes(planned) if probe else {}
    known = find_known_in_plan(planned)
    records = [dataclasses.asdict(record) for record in plan_records(planned, statuses, probes, known)]
    _show((arms_table(planned, probes), plan_table(planned, statuses, known)), records, json)


def run(
    file: str,
    jobs: int | None = None,
    retry: bool = False,
    only: list[str] | None = None,
    engine: Callable[[], Engine] = LocalEngine,
    timeout_minutes: float | None = None,
    reuse: bool = True,
) -> int:
    """Train the missing runs of a study, then report. The same command resumes after any interruption.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        jobs: Runs at once; by default one per GPU, or one per core without a GPU; on a cluster no limit.
        retry: Run crashed runs again, from zero.
        only: Runs to run, arm=NAME[,NAME] or seed=NUMBER; may be repeated; a run must then match every name.
        engine: Engine of the runs: local, slurm or ray, with its own options, e.g. --engine.num_gpus 1.
        timeout_minutes: End a run that takes longer, not counting the time that it waits for a cluster; it has failed.
        reuse: Take the results of finished runs that another study has made with the same configuration, seed, budget,
            data and code; with false every run is trained here.
    """
    from lightning_moevlm.study.plan.baseline_pin import keep_baseline
    from lightning_moevlm.study.run.ledger import Status, hold_study, read_ledger, remember_store
    from lightning_moevlm.study.run.mlflow_runs import open_experiment
    from lightning_moevlm.study.run.runs_at_work import UNREACHABLE
    from lightning_moevlm.study.run.to_do import find_waiting_runs

    terminal = console()
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}; give how many runs may go at once, at least 1")
    if timeout_minutes is not None and timeout_minutes <= 0:
        raise UserError(f"--timeout_minutes is {timeout_minutes:g}; give more than 0, or leave it out for no limit")
    chosen = _built(engine)
    planned = _plan(file)
    selected = select_runs(planned, only)
    # What is wrong is told before anything is written.
    if not all(state.status.is_settled for _, state in read_ledger(selected)):
        _check_data(selected)
    uri = open_store(planned)
    with hold_study(planned.folder):
        experiment = open_experiment(uri, planned.comparison.name)
        remember_store(planned.folder, uri)
        keep_baseline(planned)
        taken = reuse_known_runs(selected, experiment, terminal) if reuse else 0
        waiting = find_waiting_runs(selected, experiment, chosen, retry)
        if waiting:
            stopped = execute_runs(selected, experiment, waiting, terminal, chosen, jobs, timeout_minutes)
            if stopped:
                again = "".join([f" --only {each}" for each in only or ()]) + engine_options(chosen)
                told = f"Stopped by {stopped}; the state is kept. Go on with: moevlm sweep run {file}{again}"
                terminal.print(told, highlight=False, soft_wrap=True, markup=False)
                return 1 if stopped == UNREACHABLE else 130
        failed = [run.name for run, state in read_ledger(selected) if state.status is Status.FAILED]
        total = len(selected.runs)
        if not waiting and not failed:
            terminal.print(f"Nothing left to do: all {total} runs have results.", highlight=False)
        answer(planned, experiment, terminal, redraw=bool(waiting or taken))
    if failed:
        terminal.print(f"[red]{len(failed)} of {total} runs failed[/]: {', '.join(failed)}", highlight=False)
        terminal.print(f"Their last lines are in the report. After mending: moevlm sweep run {file} --retry=true")
        return 1
    return 0


def status(file: str, json: str | None = None, only: list[str] | None = None) -> None:
    """Show the state of every run of a study.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        json: Write the rows to this file as JSON; - is standard output.
        only: Runs to show, arm=NAME[,NAME] or seed=NUMBER; may be repeated; a run must then match every name.
    """
    from lightning_moevlm.study.report.plan_records import status_records
    from lightning_moevlm.study.report.tables.plan_tables import status_table
    from lightning_moevlm.study.run.ledger import read_ledger

    planned = _plan(file, only)
    upload_left_behind(planned)
    ledger = read_ledger(planned)
    records = [dataclasses.asdict(record) for record in status_records(planned, ledger)]
    _show((status_table(planned, ledger),), records, json)


def report(
    file: str,
    json: str | None = None,
    records: Literal["arms", "factors", "learning_rates", "fairness"] | None = None,
    unfair: bool = False,
    full: bool = False,
) -> None:
    """Compare the arms: print the finding, write a report to runs/sweeps/<study>/report and to MLflow.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        json: Write records to this file as JSON instead of the finding; - is standard output.
        records: Content of `json`: factors (main effects, interactions), arms (effects, stability, cost), learning
            rates, or what was not alike. By default factors if the design crosses them, else arms.
        unfair: Compare also runs that differ in steps, schedule, batch, data or their order.
        full: Also print every table of the report.
    """
    from lightning_moevlm.study.compare.collect_results import collect_results
    from lightning_moevlm.study.compare.fairness import refuse_biased
    from lightning_moevlm.study.report.write_report import make_records
    from lightning_moevlm.study.run.ledger import Status, hold_study, read_ledger
    from lightning_moevlm.study.run.mlflow_runs import open_experiment
    from lightning_moevlm.study.run.outcome import judge_ended

    planned = _plan(file)
    ledger = read_ledger(planned)
    if all(state.run_id is None for _, state in ledger):
        raise UserError(f"nothing of {planned.comparison.name} has run yet; start it with `moevlm sweep run {file}`")
    experiment = open_experiment(open_store(planned), planned.comparison.name)
    upload_left_behind(planned)
    if any(state.status is Status.ENDED for _, state in ledger):
        with hold_study(planned.folder):
            judge_ended(planned, experiment, experiment.ids())
        ledger = read_ledger(planned)
    if json is None:
        answer(planned, experiment, console(), redraw=True, unfair=unfair, full=full)
        return
    result = collect_results(planned, ledger, experiment.uri)
    kind = records or ("factors" if result.factors else "arms")
    if not unfair and kind in ("arms", "factors"):
        refuse_biased(planned.comparison.name, result.unlike, run_again(planned))
    _show((), make_records(result)[kind], json)


COMMANDS: dict[str, Callable[..., int | None]] = {
    "new": new,
    "plan": plan,
    "run": run,
    "status": status,
    "report": report,
}


def expand_shorthand(words: Sequence[str]) -> list[str]:
    """Return a command line with what people shorten written out: `--engine ray`, and `--only` more than once."""
    full: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--only":
            word = f"--only+{equals}{value}"  # the parser's sign for one more item of a list
        elif option == "--engine" and equals:
            word = f"--engine={_ENGINES.get(value, value)}"
        elif full and full[-1] == "--engine":
            word = _ENGINES.get(word, word)
        full.append(word)
    return full


def _plan(file: str, only: list[str] | None = None) -> "Plan":
    from lightning_moevlm.study.declare.study_file import read_study
    from lightning_moevlm.study.plan.baseline_pin import refuse_other_baseline
    from lightning_moevlm.study.plan.plan_study import plan_study

    study = read_study(_study_file(file))  # its mistakes are told before the seconds of importing Lightning
    from lightning_moevlm.configuration.resolver import ConfigResolver, ModelDescriber

    planned = plan_study(study, ConfigResolver(), ModelDescriber(complete=True))
    refuse_other_baseline(planned)
    return select_runs(planned, only)


def _built(engine: Callable[[], Engine]) -> Engine:
    """Build the engine; the parser hands a class on as a partial of functions of its own.

    Raises:
        UserError: the class is abstract, or refuses its options.
    """
    handed_on = engine.args if isinstance(engine, functools.partial) else (engine,)
    for part in handed_on:
        if inspect.isclass(part):
            refuse_abstract("--engine", part)
    return engine()


def _probes(planned: "Plan") -> "dict[str, Probe]":
    """Time each arm, behind a bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from lightning_moevlm.study.run.probe import probe_arms
    from lightning_moevlm.study.run.processes.command_line import training_command

    _check_data(planned)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("probe", total=len(planned.comparison.arms))
        started = iter(range(len(planned.comparison.arms)))

        def tick(arm: str) -> None:
            bar.update(task, description=f"probe {arm}", completed=next(started))

        return probe_arms(planned, lambda overrides: training_command(planned.study.base, overrides), tick)


def _study_file(file: str) -> Path:
    """Return the file itself, or the one of that name that the package ships.

    Raises:
        UserError: neither exists; names the nearest one.
    """
    from lightning_moevlm.common.shipped_files import describe_missing_file, find_file

    found = find_file(Path(file))
    if found is None:
        raise describe_missing_file("study file", Path(file))
    return found


def _check_data(planned: "Plan") -> None:
    """Look at every set of shards that the runs name, so that a missing one is told once and not by every run."""
    from lightning_moevlm.configuration.resolver import build_data

    checked: list[object] = []
    for run in planned.runs:
        data = {name: value for name, value in run.resolved["data"].items() if name != "seed"}
        if data not in checked:
            checked.append(data)
            build_data(data).prepare_data()


def _show(tables: "Sequence[Table]", records: list[dict[str, object]], json: str | None) -> None:
    from rich.text import Text

    from lightning_moevlm.study.report.terminal import print_tables

    if json is None:
        print_tables(console(), tables)
    else:
        show(Text(), records, json)


def find_known_in_plan(planned: "Plan") -> "KnownRuns | None":
    """Return what `sweep run` would take; None where the store or the data cannot be asked. Writes nothing."""
    from lightning_moevlm.study.compare.known_runs import find_known
    from lightning_moevlm.study.run.mlflow_runs import find_tracking_uri
    from lightning_moevlm.tracking.store import prepare_store, sqlite_path

    try:
        uri = find_tracking_uri(planned)
        path = sqlite_path(uri)
        if path is not None and not path.exists():
            return None
        prepare_store(uri)
        return find_known(planned, uri, _digests())
    except UserError:  # told by `sweep run`, which needs both
        return None


def reuse_known_runs(planned: "Plan", experiment: "StudyRuns", terminal: "Console") -> int:
    """Take what another study has made, say so, and return how many runs that were. Call it holding the study."""
    from lightning_moevlm.study.compare.known_runs import find_known, take_known

    known = find_known(planned, experiment.uri, _digests())
    taken = take_known(planned, experiment, known)
    for line in known.describe(len(planned.runs)):
        terminal.print(line, highlight=False, markup=False, soft_wrap=True)
    if taken:
        terminal.print("Known runs are not trained again; with --reuse=false they are.", highlight=False)
    return len(taken)


def _digests() -> Callable[[Mapping[str, Any]], str]:
    """Return a function from a data configuration to the digest of what it reads; each is read once."""
    from lightning_moevlm.configuration.resolver import build_data

    digests: dict[str, str] = {}

    def digest(data: Mapping[str, Any]) -> str:
        key = json.dumps(data, sort_keys=True, default=str)
        if key not in digests:
            digests[key] = build_data(data).manifest_digest
        return digests[key]

    return digest
