"""Describes an arm's unfinished runs, in the same words for every figure."""

from lightning_moevlm.study.compare.results import ArmResult
from lightning_moevlm.study.report.figures.report_figure import LETTERS_OF_ROW, wrap
from lightning_moevlm.study.statistics.verdict import Verdict


def describe_unfinished_runs(arm: ArmResult) -> tuple[str, ...]:
    """Return e.g. ("2 of 5 diverged", "1 of 5 did not learn"), or ("stopped early",) for a withdrawn arm."""
    if arm.verdict is Verdict.STOPPED_EARLY:
        return (str(arm.verdict),)
    return tuple(
        f"{number} of {arm.planned} {what}"
        for number, what in ((arm.diverged, "diverged"), (arm.not_learned, "did not learn"), (arm.crashed, "crashed"))
        if number
    )


def row_label(arm: ArmResult) -> str:
    """Return the label of an arm's row: its name, and its lost runs below."""
    return "\n".join([wrap(arm.arm.name, LETTERS_OF_ROW), *(f"({text})" for text in describe_unfinished_runs(arm))])
