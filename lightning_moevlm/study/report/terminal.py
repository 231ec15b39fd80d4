"""Prints the tables of a report to the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from lightning_moevlm.study.report.tables.table import STYLES, Table, find_verdict

_WIDE = Console(width=10_000)


def print_tables(console: Console, tables: Sequence[Table]) -> None:
    """Print tables, each with its notes."""
    for table in tables:
        console.print(rich_table(table, console.width))


def rich_table(table: Table, width: int) -> Group:
    """Return a table with its notes for a terminal of that width, verdicts in colour."""
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
        title=table.title, title_justify="left", title_style="bold", header_style="", box=SIMPLE_HEAD, pad_edge=False
    )
    for i, column in enumerate(table.columns[:count]):
        shown.add_column(column, overflow="fold", no_wrap=i == 0)
    for row in table.rows:
        shown.add_row(*(Text(cell, style=STYLES.get(find_verdict(cell), "")) for cell in row[:count]))
    return shown
