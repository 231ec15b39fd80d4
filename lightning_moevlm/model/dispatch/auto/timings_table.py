"""Measured times of dispatchers: a JSON file that `moevlm bench dispatch` writes and `AutoDispatcher` reads.

A file says where it comes from (torch, processor, threads, when) and holds one row per case: device, dtype and shape,
with the milliseconds and the peak memory of forward and backward of each dispatcher. The package ships a small one
measured on a CPU; a file of the user's own machine, in his cache folder, goes before it.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError

SHIPPED = Path(__file__).with_name("measured_cpu.json")
AS_FAST = 0.05  # times closer than this share cannot be told apart, so memory decides
_OTHER_LOAD = 4.0  # doublings that a bounded load and an unbounded one are apart


class Case(NamedTuple):
    """What decides which dispatcher is fastest.

    device, dtype: as torch names them. num_experts: E. rows: pairs per expert, a power of two. dim: D. hidden_dim: F.
    bounded: a capacity limits the load of each expert.
    """

    device: str
    dtype: str
    num_experts: int
    rows: int
    dim: int
    hidden_dim: int
    bounded: bool

    def __str__(self) -> str:
        """Say it in words."""
        load = "bounded load" if self.bounded else "dropless"
        return f"{self.num_experts} experts {self.dim} x {self.hidden_dim}, {self.rows} rows each, {load}, {self.dtype}"


class Row(NamedTuple):
    """One measured case, by class name of the dispatcher. milliseconds: forward and backward. peak_mib: of memory."""

    case: Case
    milliseconds: dict[str, float]
    peak_mib: dict[str, float]

    def ranked(self, names: Collection[str]) -> list[str]:
        """Return those of the names that were measured, best first.

        First come those as fast as can be told, the leanest of them first, then the others by time.
        """
        times = {name: time for name, time in self.milliseconds.items() if name in names}
        limit = (1 + AS_FAST) * min(times.values(), default=0.0)
        fast = [name for name, time in times.items() if time <= limit]
        slow = [name for name in times if name not in fast]
        return [*sorted(fast, key=self.peak_mib.__getitem__), *sorted(slow, key=times.__getitem__)]

    def told(self, names: Collection[str]) -> str:
        """Say what was measured, best first."""
        ranked = self.ranked(names)
        return ", ".join(f"{name} {self.milliseconds[name]:.3g} ms {self.peak_mib[name]:.3g} MiB" for name in ranked)


class Measured(NamedTuple):
    """A file of measurements. source: torch, processor, threads, date, command. digest: of the file, 8 digits."""

    source: dict[str, str]
    rows: tuple[Row, ...]
    path: str
    digest: str

    def nearest(self, case: Case) -> Row | None:
        """Return the row of the same device and dtype whose shape is fewest doublings away; the first of equals."""
        alike = [row for row in self.rows if row.case[:2] == case[:2]]
        return min(alike, key=lambda row: _doublings(row.case, case), default=None)


def rounded_rows(num_pairs: int, num_experts: int) -> int:
    """Return pairs per expert as the nearest power of two, so that similar batches are one case."""
    return 2 ** max(0, round(math.log2(max(1.0, num_pairs / num_experts))))


def user_file() -> Path:
    """Return where the measurements of this machine are kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "lightning-moevlm" / "dispatch.json"


def measurements(path: str | None) -> tuple[Measured, ...]:
    """Return the given file, or the user's own, where there is one, and the shipped one.

    Raises:
        UserError: a file that is missing or no table of measurements.
    """
    if path is not None:
        return (read_measured(Path(path), _version(Path(path))),)
    files = [file for file in (user_file(), SHIPPED) if file.is_file()]
    return tuple(read_measured(file, _version(file)) for file in files)


@cache
def read_measured(path: Path, version: int) -> Measured:
    """Read a file; it is read once per version (its time of change)."""
    try:
        content = path.read_bytes()
        table = json.loads(content)
        rows = tuple(
            Row(Case(**row["case"]), dict(row["milliseconds"]), dict(row["peak_mib"])) for row in table["rows"]
        )
        source = dict(table["source"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is no table of dispatcher measurements ({type(error).__name__}: {error}): write one with "
            f"`moevlm bench dispatch --table {path}`"
        ) from error
    return Measured(source, rows, str(path), hashlib.sha256(content).hexdigest()[:8])


def write_measured(path: Path, source: dict[str, str], rows: list[Row]) -> None:
    """Write a file whole."""
    table = {
        "source": source,
        "rows": [
            {"case": row.case._asdict(), "milliseconds": row.milliseconds, "peak_mib": row.peak_mib} for row in rows
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _version(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def _doublings(one: Case, other: Case) -> float:
    pairs = ((one.num_experts, other.num_experts), (one.rows, other.rows), (one.dim, other.dim))
    sizes = (*pairs, (one.hidden_dim, other.hidden_dim))
    return sum(abs(math.log2(a / b)) for a, b in sizes) + _OTHER_LOAD * (one.bounded != other.bounded)
