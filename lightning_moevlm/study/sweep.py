"""Carries a declared study through: choose its runs, execute them, upload what waits, answer with a report."""

from typing import TYPE_CHECKING

from lightning_moevlm.common.atomic_files import explain_write_errors

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_moevlm.study.plan.planned_run import Plan
    from lightning_moevlm.study.run.mlflow_runs import StudyRuns
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moevlm.study.run.engines import Engine, LocalEngine

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
    from lightning_moevlm.study.run.mlflow_runs import StudyRuns

_REPORT_FOLDER = "report"


def answer(
    planned: "Plan",
    experiment: "StudyRuns",
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
    from lightning_moevlm.study.run.ledger import STATE_FILE, read_ledger

    result = collect_results(planned, read_ledger(planned), experiment.uri)
    if not unfair:
        refuse_biased(planned.comparison.name, result.unlike, run_again(planned))
    folder, view = planned.folder / _REPORT_FOLDER, describe_view(experiment)
    page = folder / HTML_FILE
    sources = [planned.study.file, *(planned.run_folder(run) / STATE_FILE for run in planned.runs)]
    newest = max(source.stat().st_mtime for source in sources if source.exists())
    if redraw or not page.exists() or page.stat().st_mtime < newest:
        whole = make_report(describe_origin(planned, result, view), result)
        with explain_write_errors(folder, "make room or give rights"):
            write_report(whole, folder)
        log_summary(experiment, whole, folder)
        log_view(experiment, result)
    print_answer(terminal, result, full)
    terminal.print(
        f"Report with curves, stability, costs and all tables: {page.absolute()}", highlight=False, soft_wrap=True
    )
    terminal.print("Charts of all runs in MLflow, grouped by arm:", highlight=False)
    for line in view:
        terminal.print(f"    {line}", highlight=False, soft_wrap=True, markup=False)


def run_again(planned: "Plan") -> str:
    """Return what to do about runs that are not alike."""
    return (
        f"Run them again alike (remove their folders in {planned.folder}), or compare them all the same: `moevlm sweep "
        "report ... --unfair=true`"
    )


def select_runs(planned: "Plan", only: list[str] | None) -> "Plan":
    """Return the part of a plan that `--only` names."""
    from lightning_moevlm.study.plan.selection import select

    return select(planned, only or [])


def execute_runs(
    planned: "Plan",
    experiment: "StudyRuns",
    waiting: "Sequence[PlannedRun]",
    terminal: "Console",
    engine: Engine,
    jobs: int | None,
    timeout_minutes: float | None,
) -> str:
    """Run what waits, behind a bar; return the name of the signal that stopped it, or ""."""
    from lightning_moevlm.study.run.engines import JOBS_FOLDER
    from lightning_moevlm.study.run.execute import execute
    from lightning_moevlm.study.run.processes.command_line import training_command
    from lightning_moevlm.study.run.progress_bar import SweepProgress

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


def engine_options(engine: Engine) -> str:
    """Return the options that name the engine again."""
    return "" if engine.name == LocalEngine.name else f" --engine {engine.name}, with the options that it had"


def open_store(planned: "Plan") -> str:
    """Return the tracking URI in force, after it has answered and has been found to be the study's own."""
    from lightning_moevlm.study.run.ledger import check_store
    from lightning_moevlm.study.run.mlflow_runs import find_tracking_uri
    from lightning_moevlm.tracking.store import prepare_store

    uri = find_tracking_uri(planned)
    check_store(planned.folder, uri)
    prepare_store(uri)
    return uri


def upload_left_behind(planned: "Plan") -> None:
    """Deliver what the study's runs kept on disk while MLflow was silent; say what became of it on standard error."""
    from rich.console import Console

    from lightning_moevlm.study.run.ledger import read_ledger
    from lightning_moevlm.study.run.mlflow_runs import find_tracking_uri
    from lightning_moevlm.study.run.store_retries import deliver_left_behind

    ids = [state.run_id for _, state in read_ledger(planned) if state.run_id is not None]
    terminal = Console(stderr=True, soft_wrap=True, highlight=False)
    for outbox, waiting, outcome, reason in deliver_left_behind(find_tracking_uri(planned), ids):
        told = f"run {outbox.address.run_id}, {waiting.points} points and {waiting.files} files on disk: {outcome}"
        terminal.print(f"{told}, {reason}" if reason else told, markup=False)


def _with_identity(command: list[str], run_id: str, checkpoint: Path | None) -> list[str]:
    resume = ["--ckpt_path", str(checkpoint)] if checkpoint else []
    return [*command, f"--trainer.logger.init_args.run_id={run_id}", *resume]
