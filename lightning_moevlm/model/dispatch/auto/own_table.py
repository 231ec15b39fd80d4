"""Keeps the timings of the user's machine: one cached file per CPU, torch version and number of threads.

A case is measured once, by the first process that meets it; others wait for it at a lock and read the row. Rows
stay, so a resumed run and the arms of a sweep choose by the same numbers.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from lightning_moevlm.common.digest import digest_text
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.dispatch.auto.timings_table import SHIPPED, Case, Row, Table, read_table, write_table

GIVEN = "MOEVLM_DISPATCH_TABLE"
_OF_CPU = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "flags",
    "CPU implementer",
    "CPU part",
    "Features",
)


def given_table() -> Path | None:
    """Return the file that the environment names; with it nothing is measured."""
    return Path(os.environ[GIVEN]) if os.environ.get(GIVEN) else None


def machine() -> dict[str, str]:
    """Describe what timings depend on: the CPU (two may share a name), torch and its threads."""
    return _cpu() | {"torch": torch.__version__, "threads": str(torch.get_num_threads())}


def own_file() -> Path:
    """Return the file of this machine's timings; versions of this package whose cases differ have one each."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = digest_text(json.dumps([machine(), Case._fields]))
    return Path(folder) / "lightning-moevlm" / f"dispatch-{name}.json"


def own_table(path: Path) -> Table:
    """Return the table in the file; empty if it does not exist."""
    if path.is_file():
        return read_table(path)
    clock = "CPU time of the process" if torch.get_num_threads() == 1 else "wall"
    return Table(machine() | {"clock": clock, "date": time.strftime("%Y-%m-%d")}, (), {}, path)


def add(path: Path, rows: list[Row], products: dict[str, float]) -> None:
    """Add measurements to a file; processes that do so at once wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        write_table(own_table(path).merge(rows, products))


def measure_once(case: Case, measure: Callable[[], Row]) -> tuple[Table, str]:
    """Return this machine's table after measuring the case if it is missing; or the shipped table, with the reason."""
    path = own_file()
    if path.is_file() and read_table(path).row(case) is not None:
        return read_table(path), ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            table = own_table(path)
            if table.row(case) is None:
                table = table.merge([measure()], {})
                write_table(table)
            return table, ""
    except (OSError, UserError) as error:
        return read_table(SHIPPED), f"{path} cannot be written ({error}), so the shipped table is used"


def measure_products_once(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return TFLOP/s of this CPU's products, measured if missing; empty if they may not be measured."""
    if given_table() is not None:
        return {}
    path = own_file()
    if not own_table(path).products:
        try:
            add(path, [], measure())
        except (OSError, UserError):
            return {}
    return own_table(path).products


@cache
def _cpu() -> dict[str, str]:
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return {"model name": platform.processor() or platform.machine()}
    first = listing.read_text(encoding="utf-8").partition("\n\n")[0]
    fields = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in fields if key.strip() in _OF_CPU}
