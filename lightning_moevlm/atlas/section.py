"""A part of an atlas that is made on demand: sentences and tables for readers, records for programs."""

import math
from dataclasses import dataclass
from typing import Any

from lightning_moevlm.study.report.tables.table import Table


@dataclass(frozen=True)
class Section:
    """A section of the page, and a key of its JSON."""

    key: str
    title: str
    sentences: tuple[str, ...]
    tables: tuple[Table, ...]
    records: dict[str, Any]


def show_p(p: float) -> str:
    """Return a p to print."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.01 else f"{p:.2f}"


def finite(value: float | None) -> float | None:
    """Return a number with four digits; None for what JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
