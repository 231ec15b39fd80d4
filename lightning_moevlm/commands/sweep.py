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

from lightning_moevlm.commands.output import console, show
from lightning_moevlm.commands.study_guide import new
from lightning_moevlm.commands.sweep_answer import answer, run_again
from lightning_moevlm.commands.sweep_known import known_in_plan, take_up
from lightning_moevlm.errors import UserError
from lightning_moevlm.study.engines import Engine, LocalEngine, RayEngine, SlurmEngine
from lightning_moevlm.unbuildable import refuse_abstract

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_moevlm.study.claim import Experiment
    from lightning_moevlm.study.plan import Plan, PlannedRun
    from lightning_moevlm.study.probe import Probe
    from lightning_moevlm.study.table import Table

_ENGINES = {engine.name: engine.__name__ for engine in (LocalEngine, SlurmEngine, RayEngine)}


def plan(file: str, json: str | None = None, probe: bool = False, only: list[str] | None = None) -> None:
    """Show every run of a study with its difference from the base; check all of them, start none.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        json: Write the rows to this file as JSON; - is standard output.
        probe: Train a few steps of each arm here, and tell how long the study would take.
        only: Runs to show, arm=NAME[,NAME] or seed=NUMBER; may be repeated, then a run must agree with each name.
    """
    from lightning_moevlm.study.ledger import read_ledger
    from lightning_moevlm.study.listing import plan_records
    from lightning_moevlm.study.tables import arms_table, plan_table

    planned = _plan(file, only)
    statuses = {run.folder: str(state.status) for run, state in read_ledger(planned)}
    probes = _probes(planned) if probe else {}
    known = known_in_plan(planned)
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
    """Run what a study still lacks, then report. Running it again does nothing; after any interruption it goes on.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        jobs: Runs at once; by default one per GPU, or, without a GPU, one per core; on a cluster what it takes.
        retry: Run crashed runs again, from zero.
        only: Runs to run, arm=NAME[,NAME] or seed=NUMBER; may be repeated, then a run must agree with each name.
        engine: Who carries the runs out: local, slurm or ray, with options of its own, e.g. --engine.num_gpus 1.
        timeout_minutes: End a run that takes longer, not counting the time that it waits for a cluster; it has failed.
        reuse: Take the results of finished runs that another study has made with the same configuration, seed, budget,
            data and code; with false every run is trained here.
    """
    from lightning_moevlm.study.claim import open_experiment
    from lightning_moevlm.study.execute import SILENCE, to_do
    from lightning_moevlm.study.ledger import Status, hold_study, keep_store, read_ledger
    from lightning_moevlm.study.pin import keep_baseline

    terminal = console()
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}; give how many runs may go at once, at least 1")
    if timeout_minutes is not None and timeout_minutes <= 0:
        raise UserError(f"--timeout_minutes is {timeout_minutes:g}; give more than 0, or leave it out for no limit")
    chosen = _built(engine)
    planned = _plan(file)
    selected = _selected(planned, only)
    # What is wrong is told before anything is written.
    if not all(state.status.is_settled for _, state in read_ledger(selected)):
        _check_data(selected)
    uri = _store_of(planned)
    with hold_study(planned.folder):
        experiment = open_experiment(uri, planned.comparison.name)
        keep_store(planned.folder, uri)
        keep_baseline(planned)
        taken = take_up(selected, experiment, terminal) if reuse else 0
        waiting = to_do(selected, experiment, chosen, retry)
        if waiting:
            stopped = _execute(selected, experiment, waiting, terminal, chosen, jobs, timeout_minutes)
            if stopped:
                again = "".join([f" --only {each}" for each in only or ()]) + _engine_words(chosen)
                told = f"Stopped by {stopped}; the state is kept. Go on with: moevlm sweep run {file}{again}"
                terminal.print(told, highlight=False, soft_wrap=True, markup=False)
                return 1 if stopped == SILENCE else 130
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
    """Show where every run of a study stands.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        json: Write the rows to this file as JSON; - is standard output.
        only: Runs to show, arm=NAME[,NAME] or seed=NUMBER; may be repeated, then a run must agree with each name.
    """
    from lightning_moevlm.study.ledger import read_ledger
    from lightning_moevlm.study.listing import status_records
    from lightning_moevlm.study.tables import status_table

    planned = _plan(file, only)
    _deliver(planned)
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
    """Compare the arms: the finding here, HTML, Markdown and pictures in runs/sweeps/<study>/report, and in MLflow.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        json: Write records to this file as JSON instead of the finding; - is standard output.
        records: What `json` writes: factors (main effects, interactions), arms (effects, stability, cost), learning
            rates, or what was not alike. By default factors if the design crosses them, else arms.
        unfair: Compare also runs that differ in steps, schedule, batch, data or their order.
        full: Print every table of the report here too.
    """
    from lightning_moevlm.study.claim import open_experiment
    from lightning_moevlm.study.fairness import refuse_biased
    from lightning_moevlm.study.gather import gather
    from lightning_moevlm.study.judge import judge_ended
    from lightning_moevlm.study.ledger import Status, hold_study, read_ledger
    from lightning_moevlm.study.report import records_of

    planned = _plan(file)
    ledger = read_ledger(planned)
    if all(state.run_id is None for _, state in ledger):
        raise UserError(f"nothing of {planned.comparison.name} has run yet; start it with `moevlm sweep run {file}`")
    experiment = open_experiment(_store_of(planned), planned.comparison.name)
    _deliver(planned)
    if any(state.status is Status.ENDED for _, state in ledger):
        with hold_study(planned.folder):
            judge_ended(planned, experiment, experiment.ids())
        ledger = read_ledger(planned)
    if json is None:
        answer(planned, experiment, console(), redraw=True, unfair=unfair, full=full)
        return
    result = gather(planned, ledger, experiment.uri)
    kind = records or ("factors" if result.factors else "arms")
    if not unfair and kind in ("arms", "factors"):
        refuse_biased(planned.comparison.name, result.unlike, run_again(planned))
    _show((), records_of(result)[kind], json)


COMMANDS: dict[str, Callable[..., int | None]] = {
    "new": new,
    "plan": plan,
    "run": run,
    "status": status,
    "report": report,
}


def written_out(words: Sequence[str]) -> list[str]:
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
    from lightning_moevlm.study.pin import refuse_other_baseline
    from lightning_moevlm.study.plan import plan_study
    from lightning_moevlm.study.spec import read_study

    study = read_study(_study_file(file))  # its mistakes are told before the seconds of importing Lightning
    from lightning_moevlm.resolved_config import ConfigResolver, ModelDescriber

    planned = plan_study(study, ConfigResolver(), ModelDescriber(complete=True))
    refuse_other_baseline(planned)
    return _selected(planned, only)


def _selected(planned: "Plan", only: list[str] | None) -> "Plan":
    from lightning_moevlm.study.selection import select

    return select(planned, only or [])


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


def _execute(
    planned: "Plan",
    experiment: "Experiment",
    waiting: "Sequence[PlannedRun]",
    terminal: "Console",
    engine: Engine,
    jobs: int | None,
    timeout_minutes: float | None,
) -> str:
    """Run what waits, behind a bar; return the name of the signal that stopped it, or ""."""
    from lightning_moevlm.study.child import training_command
    from lightning_moevlm.study.engines import JOBS_FOLDER
    from lightning_moevlm.study.execute import execute
    from lightning_moevlm.study.progress import SweepProgress

    def command(overrides: Path, run_id: str, checkpoint: Path | None) -> list[str]:
        return _with_identity(training_command(planned.study.base, overrides), run_id, checkpoint)

    total = len(planned.runs)
    at_once = engine.open(planned.folder / JOBS_FOLDER, jobs, len(waiting))
    try:
        terminal.print(
            f"{planned.comparison.name}: {total} runs, {len(waiting)} to do, {at_once} at a time, engine {engine.name}",
            highlight=False,
        )
        with SweepProgress(terminal, total, total - len(waiting), at_once) as progress:
            tally = execute(planned, experiment, waiting, command, progress, engine, at_once, timeout_minutes)
    finally:
        engine.close()
    return tally.stopped


def _engine_words(engine: Engine) -> str:
    return "" if engine.name == LocalEngine.name else f" --engine {engine.name}, with the options that it had"


def _probes(planned: "Plan") -> "dict[str, Probe]":
    """Time each arm, behind a bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from lightning_moevlm.study.child import training_command
    from lightning_moevlm.study.probe import probe_arms

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
    from lightning_moevlm.shipped import find_file, missing_file

    found = find_file(Path(file))
    if found is None:
        raise missing_file("study file", Path(file))
    return found


def _store_of(planned: "Plan") -> str:
    """Return the tracking URI in force, after it has answered and has been found to be the study's own."""
    from lightning_moevlm.study.claim import tracking_uri_of
    from lightning_moevlm.study.ledger import check_store
    from lightning_moevlm.tracking.store import prepare_store

    uri = tracking_uri_of(planned)
    check_store(planned.folder, uri)
    prepare_store(uri)
    return uri


def _deliver(planned: "Plan") -> None:
    """Deliver what the study's runs kept on disk while MLflow was silent; say what became of it on standard error."""
    from rich.console import Console

    from lightning_moevlm.study.claim import tracking_uri_of
    from lightning_moevlm.study.ledger import read_ledger
    from lightning_moevlm.study.silent_store import deliver_left_behind

    ids = [state.run_id for _, state in read_ledger(planned) if state.run_id is not None]
    terminal = Console(stderr=True, soft_wrap=True, highlight=False)
    for outbox, waiting, outcome, reason in deliver_left_behind(tracking_uri_of(planned), ids):
        told = f"run {outbox.address.run_id}, {waiting.points} points and {waiting.files} files on disk: {outcome}"
        terminal.print(f"{told}, {reason}" if reason else told, markup=False)


def _check_data(planned: "Plan") -> None:
    """Look at every set of shards that the runs name, so that a missing one is told once and not by every run."""
    from lightning_moevlm.resolved_config import build_data

    checked: list[object] = []
    for run in planned.runs:
        data = {name: value for name, value in run.resolved["data"].items() if name != "seed"}
        if data not in checked:
            checked.append(data)
            build_data(data).prepare_data()


def _with_identity(command: list[str], run_id: str, checkpoint: Path | None) -> list[str]:
    resume = ["--ckpt_path", str(checkpoint)] if checkpoint else []
    return [*command, f"--trainer.logger.init_args.run_id={run_id}", *resume]


def _show(tables: "Sequence[Table]", records: list[dict[str, object]], json: str | None) -> None:
    from rich.text import Text

    from lightning_moevlm.study.report import print_tables

    if json is None:
        print_tables(console(), tables)
    else:
        show(Text(), records, json)
