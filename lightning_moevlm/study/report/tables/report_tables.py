"""Lists the tables of a report, in their order."""

from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.report.tables.costs_table import costs_table
from lightning_moevlm.study.report.tables.effect_tables import (
    also_table,
    effects_table,
    factors_table,
    learning_table,
    models_table,
)
from lightning_moevlm.study.report.tables.receipts_table import receipts_table
from lightning_moevlm.study.report.tables.stability_tables import (
    equal_budget_table,
    fairness_table,
    sensitivity_table,
    signs_table,
    stability_table,
)
from lightning_moevlm.study.report.tables.table import Table


def report_tables(result: StudyResult) -> tuple[Table, ...]:
    """Return every table of the report, in order."""
    tables = (
        factors_table(result),
        effects_table(result),
        learning_table(result),
        also_table(result),
        stability_table(result),
        signs_table(result),
        sensitivity_table(result),
        equal_budget_table(result),
        costs_table(result),
        models_table(result),
        receipts_table(result),
        fairness_table(result),
    )
    return tuple(table for table in tables if table is not None)
