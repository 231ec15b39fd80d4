"""Builds the table of runs that `compare` reads from MLflow."""

from lightning_moevlm.study.compare.logged_runs import describe_changes
from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.report.tables.table import NOTHING, Table
from lightning_moevlm.tracking.read.run_selection import SHOWN_DIGITS


def runs_table(result: StudyResult) -> Table:
    """Return the runs of each arm, and how its configuration differs from the baseline's."""
    changes = describe_changes(result)
    rows = tuple(
        (
            arm.arm.name,
            ", ".join(f"{r.seed}: {(r.state.run_id or NOTHING)[:SHOWN_DIGITS]}" for r in arm.runs),
            "\n".join(f"{key}: {value}" for key, value in changes[arm.arm.name].items()) or NOTHING,
        )
        for arm in result.arms
    )
    columns = ("arm", "seed: run", f"difference from {result.comparison.baseline}")
    return Table("Compared runs", columns, rows, ("Read from the configurations that the runs have logged.",))
