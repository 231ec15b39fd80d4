"""Prints the results of listing commands: a table for people, or records for programs."""

import json as json_format
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moevlm.common.atomic_files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from lightning_moevlm.data.format.manifest import Manifest


def show(table: "RenderableType", rows: Sequence[Mapping[str, object]], json: str | None) -> None:
    """Print the table, or write the rows as a JSON list.

    Args:
        table: anything that rich can print.
        rows: one record per row; values that JSON can hold.
        json: a file, "-" for standard output (nothing else is printed then), or None for the table.
    """
    if json is None:
        console().print(table)
        return
    text = json_format.dumps(list(rows), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if json == "-":
        sys.stdout.write(text)
        return
    write_atomically(Path(json), text)


def json_number(value: float) -> float | str:
    """Return a number that JSON can hold; others as text."""
    return value if math.isfinite(value) else str(value)


def console(to_stderr: bool = False) -> "Console":
    """Return a console; a log file gets a width that tables fit in."""
    from rich.console import Console

    terminal = Console(stderr=to_stderr)
    return terminal if terminal.is_terminal or "COLUMNS" in os.environ else Console(width=120, stderr=to_stderr)


def print_built(out: str, verb: str | None, manifest: "Manifest") -> None:
    """Print one line on a set: the verb (None: it was there already), samples by split, the manifest's digest."""
    from rich.console import Console

    sizes = ", ".join(f"{manifest.num_samples(split):,} {split}" for split in manifest.splits)
    line = f"{verb or 'already built, nothing to do:'} {out} ({sizes} samples; manifest {manifest.digest[:12]})"
    Console(soft_wrap=True, highlight=False).print(line, markup=False)
