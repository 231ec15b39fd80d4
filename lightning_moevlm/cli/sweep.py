"""`moevlm sweep`: options of a declared study's commands; `study/sweep.py` carries them out.

Plain typed functions. The command line makes options of their arguments and help of their docstrings.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lightning_moevlm.cli.output import console, show
from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.part_checks import refuse_abstract
from lightning_moevlm.study import cure_folder, sweep
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.run.engines import Engine, LocalEngine, RayEngine, SlurmEngine

_ENGINES = {engine.name: engine.__name__ for engine in (LocalEngine, SlurmEngine, RayEngine)}


def new(file: str) -> None:
    """Write a commented study file to start from; `sweep plan` accepts it unchanged.

    Args:
        file: File to write, e.g. mine.yaml. Its name without .yaml becomes the study's name.
    """
    from lightning_moevlm.study.declare.study_file import refuse_bad_name
    from lightning_moevlm.study.guide import skeleton

    path = Path(file)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: the name of a study file ends in .yaml; give {path.with_suffix('.yaml')}")
    refuse_bad_name(path)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(skeleton(file))
        except FileExistsError as error:
            raise UserError(f"{file} exists already; remove it, or give another name") from error
    console().print(f"Wrote {file}. Show what it would run: moevlm sweep plan {file}", highlight=False, markup=False)


def plan(file: str, json: str | None = None, probe: bool = False, only: list[str] | None = None) -> None:
    """Show and check every run of a study and its difference from the base, without training.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        json: Write the rows to this file as JSON; - is standard output.
        probe: Train a few steps of each arm here and estimate the time of the study.
        only: Runs to show, arm=NAME[,NAME] or seed=NUMBER; may be repeated; a run must then match every name.
    """
    planned = sweep.plan(file, _builders, only or ())
    _show(sweep.list_plan(planned, _builders, probe), json)


def run(
    file: str,
    jobs: int | None = None,
    retry: bool = False,
    only: list[str] | None = None,
    engine: Callable[[], Engine] = LocalEngine,
    timeout_minutes: float | None = None,
    reuse: bool = True,
    retrain: bool = False,
) -> int:
    """Train the missing runs of a study, then report. The same command resumes after any interruption.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml. Or a folder of cure studies: each of them, then the matrix,
            then some of its cells again on `fresh_seeds`.
        jobs: Runs at once; by default one per GPU, or one per core without a GPU; unlimited on a cluster.
        retry: Run failed runs again, from step 0; one that --timeout_minutes ended resumes from its last checkpoint.
        only: Runs to train, arm=NAME[,NAME] or seed=NUMBER. May be repeated; then only runs that match all of them
            are selected. The matrix of a folder is then of these seeds; where arms are named no cell is repeated.
        engine: Engine of the runs: local, slurm or ray, with its own options, e.g. --engine.num_gpus 1.
        timeout_minutes: Longest time of a run in minutes, without its wait for a cluster; a run that takes longer is
            stopped and counts as failed; null: no limit.
        reuse: Take the results of finished runs that another study has made with the same configuration, seed, budget,
            data and code; with false every run is trained here.
        retrain: Train finished runs again whose code has changed since; MLflow keeps the old runs, marked as replaced.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}; give how many runs may go at once, at least 1")
    if timeout_minutes is not None and timeout_minutes <= 0:
        raise UserError(f"--timeout_minutes is {timeout_minutes:g}; give more than 0, or leave it out for no limit")
    chosen = _build(engine)

    def run_study(planned: Plan, part: Sequence[str]) -> int:
        return sweep.run(
            planned,
            _builders,
            console(),
            chosen,
            jobs,
            timeout_minutes,
            only=part,
            retry=retry,
            reuse=reuse,
            retrain=retrain,
        )

    if cure_folder.is_folder(file):
        cures = cure_folder.plan_folder(file, _builders, only or ())
        return cure_folder.run(cures, _builders, console(), run_study)
    return run_study(sweep.plan(file, _builders), only or ())


def status(file: str, json: str | None = None, only: list[str] | None = None) -> None:
    """Show the state of every run of a study.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        json: Write the rows to this file as JSON; - is standard output.
        only: Runs to show, arm=NAME[,NAME] or seed=NUMBER; may be repeated; a run must then match every name.
    """
    _show(sweep.list_states(sweep.plan(file, _builders), only or ()), json)


def report(
    file: str,
    json: str | None = None,
    records: Literal["arms", "factors", "learning_rates", "claims", "fairness"] | None = None,
    unfair: bool = False,
    full: bool = False,
) -> None:
    """Compare the arms: print the finding, write a report to runs/sweeps/<study>/report and to MLflow.

    Args:
        file: Study file, e.g. ablations/quickstart.yaml.
        json: Write records to this file as JSON instead of the finding; - is standard output.
        records: Content of `json`: factors (main effects, interactions), arms (effects, stability, cost), learning
            rates, published claims, or differences between runs that may bias the result. By default factors if the
            design crosses them, else arms.
        unfair: Compare also runs that differ in steps, schedule, batch, data or their order.
        full: Also print every table of the report.
    """
    planned = sweep.plan(file, _builders)
    if json is None:
        sweep.report(planned, console(), unfair, full)
    else:
        _show(((), sweep.list_results(planned, records, unfair)), json)


def matrix(folder: str, json: str | None = None, only: list[str] | None = None) -> None:
    """Draw the matrix of illnesses and cures from what the cure studies of a folder have run, without training.

    Args:
        folder: Folder of cure studies, e.g. ablations/cures. `moevlm sweep run FOLDER` trains what is missing.
        json: Write the matrix to this file as JSON instead; - is standard output.
        only: Seeds to draw, seed=NUMBER[,NUMBER]; the other seeds of the studies then count nowhere.
    """
    for text in only or ():
        if not text.startswith("seed="):
            raise UserError(f"--only {text}: a matrix has every arm; give seed=NUMBER[,NUMBER]")
    cures = cure_folder.plan_folder(folder, _builders, only or ())
    if json is None:
        cure_folder.draw(cures, _builders, console())
    else:
        _show(((), cure_folder.list_rows(cures, _builders)), json)


COMMANDS: dict[str, Callable[..., int | None]] = {
    "new": new,
    "plan": plan,
    "run": run,
    "status": status,
    "report": report,
    "matrix": matrix,
}


def expand_shorthand(words: Sequence[str]) -> list[str]:
    """Return a command line with shorthand expanded: `--engine ray`, and `--only` more than once."""
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


@functools.cache
def _builders() -> sweep.Builders:
    from lightning_moevlm.configuration.resolver import ConfigResolver, ModelDescriber, build_data

    return sweep.Builders(ConfigResolver(), ModelDescriber(complete=True), build_data)


def _build(engine: Callable[[], Engine]) -> Engine:
    """Build the engine; the parser hands a class on as a partial of functions of its own.

    Raises:
        UserError: The class is abstract, or refuses its options.
    """
    for part in engine.args if isinstance(engine, functools.partial) else (engine,):
        if inspect.isclass(part):
            refuse_abstract("--engine", part)
    return engine()


def _show(listing: sweep.Listing, json: str | None) -> None:
    tables, records = listing
    if json is not None:
        show("", records, json)
        return
    from lightning_moevlm.study.report.terminal import print_tables

    print_tables(console(), tables)
