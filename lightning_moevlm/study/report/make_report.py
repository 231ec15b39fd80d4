"""Computes a report: sentences, tables and figures; `write_report` writes them as HTML, Markdown and records."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.study.compare.results import ArmResult, StudyResult
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.report.figures import ReportFigure, draw_all
from lightning_moevlm.study.report.render import list_versions
from lightning_moevlm.study.report.sentences import (
    count_verdicts,
    describe_answer,
    describe_findings,
    describe_learning,
    describe_undrawn,
)
from lightning_moevlm.study.report.tables.effect_tables import answer_table
from lightning_moevlm.study.report.tables.report_tables import report_tables
from lightning_moevlm.study.report.tables.table import Table, format_changes
from lightning_moevlm.study.report.terminal import print_tables

PACKAGES = ("torch", "lightning", "mlflow")


@dataclass(frozen=True)
class ArmStory:
    """An arm in words."""

    name: str
    description: str
    changes: tuple[str, ...]
    """`key: value`, over what the arm is compared with."""
    commands: tuple[str, ...]
    """To train each seed by hand."""
    log_tails: tuple[str, ...]
    """Of crashed runs."""


@dataclass(frozen=True)
class Origin:
    """Where a report comes from."""

    kind: str
    """Of report, as its first line says it."""
    compared_with: str
    """The configuration that the arms' changes are relative to."""
    rerun: str
    """The command that writes the report again."""
    rerun_effect: str
    """How that command treats runs without a result."""
    arms: tuple[ArmStory, ...]
    tables: tuple[Table, ...] = ()
    """Shown before the tables of every report."""
    mlflow: tuple[str, ...] = ()
    """Command and link that open the runs' charts; the link alone where MLflow is a server."""


@dataclass(frozen=True)
class Report:
    """A whole report before it is written."""

    result: StudyResult
    count: str
    """The number of verdicts of each kind; empty for a few."""
    finding: tuple[str, ...]
    """One per factor of a design that crosses them, else one per arm."""
    learned: str
    """Comparison with the untrained models."""
    tables: tuple[Table, ...]
    figures: tuple[ReportFigure, ...]
    undrawn: str
    """Arms that no figure shows; empty if all are shown."""
    origin: Origin
    versions: str
    written: str

    @property
    def rest(self) -> tuple[Table, ...]:
        """The tables that no figure draws."""
        drawn = {figure.name for figure in self.figures}
        return tuple(table for table in self.tables if table.figure not in drawn)


def make_report(origin: Origin, result: StudyResult) -> Report:
    """Compute all sentences, tables and figures."""
    packages = list_versions(*PACKAGES)
    return Report(
        result=result,
        count=count_verdicts(result),
        finding=describe_findings(result),
        learned=describe_learning(result),
        tables=origin.tables + report_tables(result),
        figures=tuple(draw_all(result)),
        undrawn=describe_undrawn(result),
        origin=origin,
        versions=packages,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def describe_origin(plan: Plan, result: StudyResult, mlflow: tuple[str, ...] = ()) -> Origin:
    """Return the origin of a study's report."""
    return Origin(
        kind="Ablation study",
        compared_with=_base_of(plan),
        rerun=shlex.join(["moevlm", "sweep", "run", str(plan.study.file)]),
        rerun_effect="resumes them",
        arms=tuple(_story(plan, arm) for arm in result.arms),
        mlflow=mlflow,
    )


def print_answer(console: Console, result: StudyResult, full: bool, before: Sequence[Table] = ()) -> None:
    """Print the findings as sentences, then as one table; full: then every other table too."""
    for line in describe_answer(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    answer = answer_table(result)
    print_tables(console, (answer, *before))
    if full:
        print_tables(console, [table for table in report_tables(result) if table.title != answer.title])


def _base_of(plan: Plan) -> str:
    shared = ", ".join(format_changes(flatten_values(plan.study.all_arms)))
    return f"the base with {shared} (all_arms)" if shared else "the base"


def _story(plan: Plan, arm: ArmResult) -> ArmStory:
    base = [word for file in plan.study.base for word in ("-c", str(file))]
    commands = [
        shlex.join(["moevlm", "fit", *base, "-c", str(plan.run_folder(run) / "overrides.yaml")])
        for run in plan.runs
        if run.arm == arm.arm.name
    ]
    tails = tuple(f"{r.name}: {r.state.reason}\n" + "\n".join(r.state.log_tail) for r in arm.runs if r.state.log_tail)
    return ArmStory(
        arm.arm.name, arm.arm.description, format_changes(flatten_values(arm.arm.changes)), tuple(commands), tails
    )
