"""How `moevlm sweep` answers: the finding in the terminal, the report on disk and in MLflow."""

from typing import TYPE_CHECKING

from lightning_moevlm.commands.output import written

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_moevlm.study.claim import Experiment
    from lightning_moevlm.study.plan import Plan

_REPORT_FOLDER = "report"


def answer(
    planned: "Plan",
    experiment: "Experiment",
    terminal: "Console",
    redraw: bool,
    unfair: bool = False,
    full: bool = False,
) -> None:
    """Print the finding; draw and write the report unless it is newer than every run and the study file."""
    from lightning_moevlm.study.fairness import refuse_biased
    from lightning_moevlm.study.gather import gather
    from lightning_moevlm.study.ledger import STATE_FILE, read_ledger
    from lightning_moevlm.study.report import HTML_FILE, make_report, origin_of, print_answer, write_report
    from lightning_moevlm.study.summary_run import log_summary
    from lightning_moevlm.tracking.links import compare_link, server_command, ui_address

    result = gather(planned, read_ledger(planned), experiment.uri)
    if not unfair:
        refuse_biased(planned.comparison.name, result.unlike, run_again(planned))
    folder = planned.folder / _REPORT_FOLDER
    page = folder / HTML_FILE
    sources = [planned.study.file, *(planned.run_folder(run) / STATE_FILE for run in planned.runs)]
    newest = max(source.stat().st_mtime for source in sources if source.exists())
    if redraw or not page.exists() or page.stat().st_mtime < newest:
        whole = make_report(origin_of(planned, result), result)
        with written(folder, "make room or give rights"):
            write_report(whole, folder)
        log_summary(experiment, whole, folder)
    print_answer(terminal, result, full)
    command = server_command(experiment.uri)
    terminal.print(
        f"Report with curves, stability, costs and all tables: {page.absolute()}", highlight=False, soft_wrap=True
    )
    if command:
        terminal.print(f"MLflow: {command}", highlight=False, soft_wrap=True, markup=False)
    address = ui_address(experiment.uri)
    link = compare_link(address, experiment.experiment_id, planned.comparison.name)
    terminal.print(f"        {link}", highlight=False, soft_wrap=True, markup=False)


def run_again(planned: "Plan") -> str:
    """Return what to do about runs that are not alike."""
    return (
        f"Run them again alike (remove their folders in {planned.folder}), or compare them all the same: `moevlm sweep "
        "report ... --unfair=true`"
    )
