"""The report of a study: terminal table, one self-contained HTML file, Markdown, pictures and records.

Everything is written to a folder beside and then moved over, so a reader never meets half a report.
"""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from rich.console import Console

from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.study.compare.results import ArmResult, StudyResult
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.report.figures import ReportFigure, draw_all
from lightning_moevlm.study.report.sentences import (
    count_verdicts,
    describe_answer,
    describe_findings,
    describe_learning,
    describe_undrawn,
)
from lightning_moevlm.study.report.tables.effect_tables import answer_table
from lightning_moevlm.study.report.tables.report_tables import report_tables
from lightning_moevlm.study.report.tables.table import Table
from lightning_moevlm.study.report.terminal import print_tables

_PACKAGES = ("lightning-moevlm", "torch", "lightning", "mlflow")


@dataclass(frozen=True)
class ArmStory:
    """What the report says of an arm besides numbers. changes: over what it is held against; commands: one per seed."""

    name: str
    description: str
    changes: tuple[str, ...]
    commands: tuple[str, ...]
    log_tails: tuple[str, ...]


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
    """A whole report before it is written.

    count: one sentence on how many verdicts there are of each kind, empty where they are few; finding: one per factor
    of a design that crosses them, else per arm; learned: one on the untrained models; undrawn: one on arms that no
    picture shows.
    """

    result: StudyResult
    count: str
    finding: tuple[str, ...]
    learned: str
    tables: tuple[Table, ...]
    figures: tuple[ReportFigure, ...]
    undrawn: str
    origin: Origin
    versions: str
    written: str

    @property
    def rest(self) -> tuple[Table, ...]:
        """The tables that no picture draws."""
        drawn = {picture.name for picture in self.figures}
        return tuple(table for table in self.tables if table.figure not in drawn)


def make_report(origin: Origin, result: StudyResult) -> Report:
    """Compute everything that the report shows."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
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
    """Return where the report of a study comes from."""
    return Origin(
        kind="Ablation study",
        compared_with=_base_of(plan),
        rerun=shlex.join(["moevlm", "sweep", "run", str(plan.study.file)]),
        rerun_effect="goes on where it was",
        arms=tuple(_story(plan, arm) for arm in result.arms),
        mlflow=mlflow,
    )


def print_answer(console: Console, result: StudyResult, full: bool, before: Sequence[Table] = ()) -> None:
    """Print what was found, first in sentences, then in one table; full: then every other table too."""
    for line in describe_answer(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    answer = answer_table(result)
    print_tables(console, (answer, *before))
    if full:
        print_tables(console, [table for table in report_tables(result) if table.title != answer.title])


def _base_of(plan: Plan) -> str:
    shared = ", ".join(
        f"{key}: {'null' if value is None else value}" for key, value in flatten_values(plan.study.all_arms).items()
    )
    return f"the base with {shared} (all_arms)" if shared else "the base"


def _story(plan: Plan, arm: ArmResult) -> ArmStory:
    base = [word for file in plan.study.base for word in ("-c", str(file))]
    commands = [
        shlex.join(["moevlm", "fit", *base, "-c", str(plan.run_folder(run) / "overrides.yaml")])
        for run in plan.runs
        if run.arm == arm.arm.name
    ]
    changes = _changes(arm.arm.changes)
    tails = tuple(f"{r.name}: {r.state.reason}\n" + "\n".join(r.state.log_tail) for r in arm.runs if r.state.log_tail)
    return ArmStory(arm.arm.name, arm.arm.description, changes, tuple(commands), tails)


def _changes(config: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(f"{key}: {'null' if value is None else value}" for key, value in flatten_values(config).items())
