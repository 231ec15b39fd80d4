"""The report of a study: terminal table, one self-contained HTML file, Markdown, pictures and records.

Everything is written to a folder beside and then moved over, so a reader never meets half a report.
"""

import base64
import dataclasses
import json
import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from lightning_moevlm.errors import UserError
from lightning_moevlm.study.figures import Picture, draw_all
from lightning_moevlm.study.finding import answer_lines, count, findings, learned, undrawn
from lightning_moevlm.study.plan import Plan, flat
from lightning_moevlm.study.result_records import arm_record, factor_records, ladder_records, unlike_records
from lightning_moevlm.study.results import ArmResult, StudyResult
from lightning_moevlm.study.table import Table
from lightning_moevlm.study.tables import answer_table, report_tables
from lightning_moevlm.study.verdict import Verdict

if TYPE_CHECKING:
    from markupsafe import Markup

HTML_FILE, MARKDOWN_FILE, TABLES_FOLDER = "report.html", "report.md", "tables"
Records = Literal["arms", "factors", "learning_rates", "fairness"]
RECORDS_FILES: dict[Records, str] = {
    "arms": "report.json",
    "factors": "factors.json",
    "learning_rates": "learning_rates.json",
    "fairness": "fairness.json",
}
_WIDE = Console(width=10_000)
_TEMPLATES = Path(__file__).parent / "templates"
_STYLES: dict[str, str] = {
    Verdict.HELPS: "green",
    Verdict.HURTS: "red",
    Verdict.BREAKS_GUARD: "red",
    Verdict.NO_DIFFERENCE: "blue",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.STOPPED_EARLY: "yellow",
}
_PACKAGES = ("lightning-moevlm", "torch", "lightning", "mlflow")


@dataclass(frozen=True)
class ArmStory:
    """What the report says of an arm besides numbers. changes: over what it is held against; commands: one per seed."""

    name: str
    description: str
    changes: tuple[str, ...]
    commands: tuple[str, ...]
    log_tails: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """Where the report comes from. kind: of what it is a report; held_against: what arms' changes go over.

    rerun: the command that writes it again; goes_on: what that command does for runs without a result yet. tables:
    beside those of every report, before them.
    """

    kind: str
    held_against: str
    rerun: str
    goes_on: str
    arms: tuple[ArmStory, ...]
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Report:
    """A whole report before it is written.

    count: one sentence on how many verdicts there are of each kind, empty where they are few; finding: one per factor
    of a design that crosses them, else per arm; learned: one on the untrained models; undrawn: one on arms that no
    picture shows.
    """

    result: StudyResult
    count: str
    finding: tuple[str, ...]
    learned: str
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    undrawn: str
    origin: Origin
    versions: str
    written: str

    @property
    def rest(self) -> tuple[Table, ...]:
        """The tables that no picture draws."""
        drawn = {picture.name for picture in self.pictures}
        return tuple(table for table in self.tables if table.picture not in drawn)


def make_report(origin: Origin, result: StudyResult) -> Report:
    """Compute everything that the report shows."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return Report(
        result=result,
        count=count(result),
        finding=findings(result),
        learned=learned(result),
        tables=origin.tables + report_tables(result),
        pictures=tuple(draw_all(result)),
        undrawn=undrawn(result),
        origin=origin,
        versions=packages,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def origin_of(plan: Plan, result: StudyResult) -> Origin:
    """Return where the report of a study comes from."""
    return Origin(
        kind="Ablation study",
        held_against=_base_of(plan),
        rerun=shlex.join(["moevlm", "sweep", "run", str(plan.study.file)]),
        goes_on="goes on where it was",
        arms=tuple(_story(plan, arm) for arm in result.arms),
    )


def write_report(report: Report, folder: Path) -> Path:
    """Write HTML, Markdown, pictures and records into a folder, replacing what was there; return the HTML file.

    The folder is taken away with all that is in it: where a user names it, ask `refuse_other_folder` first.
    """
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for picture in report.pictures:
        (beside / f"{picture.name}.png").write_bytes(picture.png)
    (beside / HTML_FILE).write_text(_render("report.html.j2", report), encoding="utf-8")
    (beside / MARKDOWN_FILE).write_text(_render("report.md.j2", report), encoding="utf-8")
    (beside / TABLES_FOLDER).mkdir()
    for table in report.tables:
        (beside / table_file(table)).write_text(json.dumps(_as_columns(table)) + "\n", encoding="utf-8")
    for kind, records in records_of(report.result).items():
        (beside / RECORDS_FILES[kind]).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)
    return folder / HTML_FILE


def refuse_other_folder(folder: Path) -> None:
    """Refuse to put a report in the place of anything but a report.

    Raises:
        UserError: the folder holds something else, or it is a file.
    """
    if not folder.exists():
        return
    own = {HTML_FILE, MARKDOWN_FILE, TABLES_FOLDER, *RECORDS_FILES.values()}
    others = [] if folder.is_dir() else [folder.name]
    others = others or [entry.name for entry in folder.iterdir() if entry.name not in own and entry.suffix != ".png"]
    if others:
        raise UserError(
            f"{folder} holds {sorted(others)[0]!r}, which is no part of a report, and a report takes the place of its "
            "folder; name a new folder"
        )


def table_file(table: Table) -> str:
    """Return where in the report's folder a table lies as JSON of columns and rows, which MLflow shows as a table."""
    name = re.sub(r"[^a-z0-9]+", "_", table.title.lower()).strip("_")
    return f"{TABLES_FOLDER}/{name}.json"


def _as_columns(table: Table) -> dict[str, object]:
    return {"columns": list(table.columns), "data": [list(row) for row in table.rows]}


def records_of(result: StudyResult) -> dict[Records, list[dict[str, object]]]:
    """Return the records of every table, by kind; most tables are made of those of arms."""
    return {
        "arms": [dataclasses.asdict(arm_record(result, arm)) for arm in result.arms],
        "factors": [dataclasses.asdict(record) for record in factor_records(result)],
        "learning_rates": [dataclasses.asdict(record) for record in ladder_records(result)],
        "fairness": [dataclasses.asdict(record) for record in unlike_records(result)],
    }


def print_answer(console: Console, result: StudyResult, full: bool, before: Sequence[Table] = ()) -> None:
    """Print what was found, first in sentences, then in one table; full: then every other table too."""
    for line in answer_lines(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    answer = answer_table(result)
    print_tables(console, (answer, *before))
    if full:
        print_tables(console, [table for table in report_tables(result) if table.title != answer.title])


def print_tables(console: Console, tables: Sequence[Table]) -> None:
    """Print tables for people, each with its notes."""
    for table in tables:
        console.print(rich_table(table, console.width))


def rich_table(table: Table, width: int) -> Group:
    """Return a table with its notes for a terminal of that width; verdicts are coloured where it has colours."""
    shown, notes = _rich_columns(table, len(table.columns)), list(table.notes)
    wanted = Measurement.get(_WIDE, _WIDE.options, shown).maximum
    if table.essential and wanted > width:
        shown = _rich_columns(table, table.essential)
        left = len(table.columns) - table.essential
        more = "one more column needs" if left == 1 else f"{left} more columns need"
        notes.append(f"{more} a terminal of {wanted} characters.")
    return Group(shown, *(Text(note, style="dim") for note in notes), Text())


def _rich_columns(table: Table, count: int) -> RichTable:
    shown = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        header_style="",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, column in enumerate(table.columns[:count]):
        shown.add_column(column, overflow="fold", no_wrap=i == 0)
    for row in table.rows:
        shown.add_row(*(Text(cell, style=_STYLES.get(verdict_of(cell), "")) for cell in row[:count]))
    return shown


def verdict_of(cell: str) -> str:
    """Return the verdict that a cell of a table shows, or an empty text."""
    return next((str(verdict) for verdict in _STYLES if cell == verdict or cell.startswith(f"{verdict} within ")), "")


def _base_of(plan: Plan) -> str:
    shared = ", ".join(
        f"{key}: {'null' if value is None else value}" for key, value in flat(plan.study.all_arms).items()
    )
    return f"the base with {shared} (all_arms)" if shared else "the base"


def _story(plan: Plan, arm: ArmResult) -> ArmStory:
    base = [word for file in plan.study.base for word in ("-c", str(file))]
    commands = [
        shlex.join(["moevlm", "fit", *base, "-c", str(plan.run_folder(run) / "overrides.yaml")])
        for run in plan.runs
        if run.arm == arm.arm.name
    ]
    changes = _changes(arm.arm.changes)
    tails = tuple(f"{r.name}: {r.state.reason}\n" + "\n".join(r.state.log_tail) for r in arm.runs if r.state.log_tail)
    return ArmStory(arm.arm.name, arm.arm.description, changes, tuple(commands), tails)


def _changes(config: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(f"{key}: {'null' if value is None else value}" for key, value in flat(config).items())


def _breakable(name: str) -> "Markup":
    """Return a name as HTML that may be broken after each _ and / that it has; what is copied is the name."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(?<=[_/])(?=[^_/])", "<wbr>", str(escape(name))))


def _render(template: str, report: Report) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=template.startswith("report.html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["data_uri"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    environment.filters["verdict_class"] = lambda cell: verdict_of(cell).replace(" ", "-")
    environment.filters["breakable"] = _breakable
    environment.filters["markdown_cell"] = lambda text: text.replace("|", "\\|")
    return environment.get_template(template).render(
        report=report, result=report.result, study=report.result.comparison
    )
