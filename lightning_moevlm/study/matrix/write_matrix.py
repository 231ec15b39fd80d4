"""Writes the matrix from its one record: HTML, Markdown, PNG, JSON and the table of advice; logs them to MLflow."""

import json
import shutil
import time
from pathlib import Path

from lightning_moevlm.study.matrix.figure import draw_dark, draw_matrix
from lightning_moevlm.study.matrix.records import Matrix
from lightning_moevlm.study.matrix.surprises import describe_surprises, find_surprises
from lightning_moevlm.study.matrix.tables import advice_table, all_tables, share_table
from lightning_moevlm.study.matrix.texts import describe_fresh, describe_missing, describe_rows, describe_whole
from lightning_moevlm.study.report.make_report import PACKAGES
from lightning_moevlm.study.report.mlflow_summary import log_to_summary
from lightning_moevlm.study.report.render import list_versions, render
from lightning_moevlm.study.report.result_records import to_json
from lightning_moevlm.study.run.mlflow_runs import StudyRuns

HTML_FILE, MARKDOWN_FILE, JSON_FILE = "matrix.html", "matrix.md", "matrix.json"
ADVICE_FILE = "advice.md"
"""The table for a person with a sick run alone, to be put into a guide."""


def write_matrix(matrix: Matrix, folder: Path) -> Path:
    """Write everything into a folder, replacing it as a whole; return the HTML file."""
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    figure, tables = draw_matrix(matrix), all_tables(matrix)
    values = {
        "matrix": matrix,
        "figure": figure,
        "finding": tuple(filter(None, (*describe_rows(matrix), describe_whole(matrix), describe_fresh(matrix)))),
        "surprises": describe_surprises(matrix),
        "missing": describe_missing(matrix),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "versions": list_versions(*PACKAGES),
    }
    drawn = share_table(matrix).title  # the page folds it below the figure
    (beside / f"{figure.name}.png").write_bytes(figure.png)
    (beside / f"{figure.name}_dark.png").write_bytes(draw_dark(matrix))
    page = render("matrix.html.j2", tables=[table for table in tables if table.title != drawn], **values)
    (beside / HTML_FILE).write_text(page, encoding="utf-8")
    (beside / MARKDOWN_FILE).write_text(render("matrix.md.j2", tables=tables, **values), encoding="utf-8")
    (beside / ADVICE_FILE).write_text(render("guide.md.j2", shown=advice_table(matrix)), encoding="utf-8")
    record = to_json(matrix) | {"surprises": to_json(find_surprises(matrix))}
    (beside / JSON_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)
    return folder / HTML_FILE


def log_matrix(experiment: StudyRuns, matrix: Matrix, folder: Path) -> str:
    """Log the written matrix to its summary run; return that run's id."""
    lines = "\n".join(f"- {line}" for line in describe_rows(matrix))
    note = f"**Which cure undoes which illness?**\n\n{lines}\n\nSee artifacts, `report/{MARKDOWN_FILE}`."
    return log_to_summary(
        experiment, folder, {"mlflow.note.content": note, "complete": str(not matrix.missing).lower()}
    )
