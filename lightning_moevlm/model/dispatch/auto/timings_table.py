"""Measured times of dispatchers: a JSON file with one row per case, which `AutoDispatcher` chooses by.

A row holds the milliseconds of forward and backward of each dispatcher at evenly loaded experts. The package ships a
small file measured on one CPU; `own_table` keeps that of the user's machine.
"""

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.atomic_files import write_atomically
from lightning_moevlm.common.errors import UserError

SHIPPED = Path(__file__).with_name("measured_cpu.json")


class Case(NamedTuple):
    """The case that decides which dispatcher is fastest, apart from the balance of loads.

    device, dtype: torch's names.
    num_experts: E.
    rows: pairs per expert, a power of two.
    dim: D.
    hidden_dim: F.
    num_stacks: matrix stacks of the experts, 2 plain or 3 gated.
    beside: a way of another package that runs the experts, too, and is measured along; empty without.
    """

    device: str
    dtype: str
    num_experts: int
    rows: int
    dim: int
    hidden_dim: int
    num_stacks: int
    beside: str = ""

    def __str__(self) -> str:
        """Describe the case."""
        sizes = f"{self.dim} x {self.hidden_dim} x {self.num_stacks}"
        return f"{self.num_experts} experts {sizes}, {self.rows} rows each, {self.dtype}"


class Row(NamedTuple):
    """One measured case. milliseconds: forward and backward, by name of the dispatcher."""

    case: Case
    milliseconds: dict[str, float]


class Table(NamedTuple):
    """A file of measurements.

    source: machine and method of the measurements.
    rows: one per case.
    products: TFLOP/s of matrix products, by dtype.
    path: path of the file.
    """

    source: dict[str, str]
    rows: tuple[Row, ...]
    products: dict[str, float]
    path: Path

    def row(self, case: Case) -> Row | None:
        """Return what was measured for exactly this case."""
        return next((row for row in self.rows if row.case == case), None)

    def nearest(self, case: Case) -> Row | None:
        """Return the row of the same device and dtype whose shape is fewest doublings away; the first of equals.

        Rows of ours alone serve a case with another way beside it where no row has that.
        """
        known = [row for row in self.rows if row.case[:2] == case[:2]]
        alike = [row for row in known if row.case.beside == case.beside]
        alike = alike or [row for row in known if not row.case.beside]
        return min(alike, key=lambda row: _doublings(row.case, case), default=None)

    def describe(self, row: Row) -> str:
        """Name the file and the row by its content, so that equal names mean equal choices."""
        content = json.dumps([row.case, row.milliseconds], sort_keys=True)
        return f"table {self.path.name}, row {hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def merge(self, rows: list[Row], products: dict[str, float]) -> "Table":
        """Return the table with more rows and products; equal cases are replaced."""
        by_case = {row.case: row for row in (*self.rows, *rows)}
        return self._replace(rows=tuple(by_case.values()), products=self.products | products)


def round_rows(num_pairs: int, num_experts: int) -> int:
    """Return pairs per expert as the nearest power of two, so that similar batches are one case."""
    return 2 ** max(0, round(math.log2(max(1.0, num_pairs / num_experts))))


def read_table(path: Path) -> Table:
    """Read a file; it is read once per version.

    Raises:
        UserError: the file is missing or not a table of measurements.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _refusal(path, error) from error
    return _read(path, (status.st_mtime_ns, status.st_ino, status.st_size))


@cache
def _read(path: Path, version: tuple[int, int, int]) -> Table:
    try:
        table = json.loads(path.read_bytes())
        rows = tuple(Row(Case(**row["case"]), dict(row["milliseconds"])) for row in table["rows"])
        return Table(dict(table["source"]), rows, dict(table["products"]), path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _refusal(path, error) from error


def write_table(table: Table) -> None:
    """Write a file whole."""
    rows = [{"case": row.case._asdict(), "milliseconds": row.milliseconds} for row in table.rows]
    content = {"source": table.source, "products": table.products, "rows": rows}
    write_atomically(table.path, json.dumps(content, indent=1) + "\n")


def _refusal(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is not a table of dispatcher measurements ({type(error).__name__}: {error}); remove it and write one "
        f"with `moevlm bench dispatch --table {path}`"
    )


def _doublings(one: Case, other: Case) -> float:
    return sum(abs(math.log2(a / b)) for a, b in zip(one[2:7], other[2:7], strict=True))
