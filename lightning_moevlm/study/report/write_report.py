"""Writes a report to disk: HTML, Markdown, CSV tables and JSON records."""

import json
import re
import shutil
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.report.make_report import Report
from lightning_moevlm.study.report.render import render
from lightning_moevlm.study.report.result_records import RECORDS_FILES, make_records
from lightning_moevlm.study.report.tables.guide_table import guide_table
from lightning_moevlm.study.report.tables.table import Table

HTML_FILE, MARKDOWN_FILE, TABLES_FOLDER = "report.html", "report.md", "tables"
GUIDE_FILE = "guide.md"
"""The table of tasks and arms alone, to be put into a guide."""


def write_report(report: Report, folder: Path) -> Path:
    """Write HTML, Markdown, figures and records into a folder, replacing it; return the HTML file.

    All is written to a folder beside and then moved over, so no reader finds half a report. A folder that a user
    names is checked by `refuse_other_folder` before.
    """
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for figure in report.figures:
        (beside / f"{figure.name}.png").write_bytes(figure.png)
    values = {"report": report, "result": report.result, "study": report.result.comparison}
    (beside / HTML_FILE).write_text(render("report.html.j2", **values), encoding="utf-8")
    (beside / MARKDOWN_FILE).write_text(render("report.md.j2", **values), encoding="utf-8")
    shown = guide_table(report.result)
    if shown is not None:
        (beside / GUIDE_FILE).write_text(render("guide.md.j2", shown=shown), encoding="utf-8")
    (beside / TABLES_FOLDER).mkdir()
    for table in report.tables:
        (beside / table_file(table)).write_text(json.dumps(_as_columns(table)) + "\n", encoding="utf-8")
    for kind, records in make_records(report.result).items():
        (beside / RECORDS_FILES[kind]).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)
    return folder / HTML_FILE


def refuse_other_folder(folder: Path) -> None:
    """Refuse to replace anything but a report.

    Raises:
        UserError: The folder holds something else, or it is a file.
    """
    if not folder.exists():
        return
    own = {HTML_FILE, MARKDOWN_FILE, GUIDE_FILE, TABLES_FOLDER, *RECORDS_FILES.values()}
    others = [] if folder.is_dir() else [folder.name]
    others = others or [entry.name for entry in folder.iterdir() if entry.name not in own and entry.suffix != ".png"]
    if others:
        raise UserError(
            f"{folder} holds {sorted(others)[0]!r}, which is not part of a report. A report replaces its folder. "
            "Name a new folder"
        )


def table_file(table: Table) -> str:
    """Return the table's file in the report's folder: JSON of columns and rows, which MLflow shows as a table."""
    name = re.sub(r"[^a-z0-9]+", "_", table.title.lower()).strip("_")
    return f"{TABLES_FOLDER}/{name}.json"


def _as_columns(table: Table) -> dict[str, object]:
    return {"columns": list(table.columns), "data": [list(row) for row in table.rows]}
