"""Lists the tables of a report, in their order."""

from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.report.tables import effect_tables, stability_tables
from lightning_moevlm.study.report.tables.claims_table import claims_table
from lightning_moevlm.study.report.tables.costs_table import costs_table
from lightning_moevlm.study.report.tables.receipts_table import receipts_table
from lightning_moevlm.study.report.tables.table import Table


def report_tables(result: StudyResult) -> tuple[Table, ...]:
    """Return every table of the report, in order."""
    tables = (
        claims_table(result),
        effect_tables.factors_table(result),
        effect_tables.effects_table(result),
        effect_tables.learning_table(result),
        effect_tables.metrics_table(result),
        stability_tables.stability_table(result),
        stability_tables.signs_table(result),
        stability_tables.sensitivity_table(result),
        stability_tables.equal_budget_table(result),
        costs_table(result),
        effect_tables.models_table(result),
        receipts_table(result),
        stability_tables.fairness_table(result),
    )
    return tuple(table for table in tables if table is not None)
