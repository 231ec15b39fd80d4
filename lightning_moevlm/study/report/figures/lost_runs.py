"""What became of an arm's runs that did not finish, in the words that every picture says it in."""

from lightning_moevlm.study.compare.results import ArmResult
from lightning_moevlm.study.report.figures.report_figure import LETTERS_OF_ROW, wrap
from lightning_moevlm.study.statistics.verdict import Verdict


def describe_lost_runs(arm: ArmResult) -> tuple[str, ...]:
    """Return e.g. ("2 of 5 diverged", "1 of 5 failed"); of an arm that the study's rule has withdrawn, that alone."""
    if arm.verdict is Verdict.STOPPED_EARLY:
        return (str(arm.verdict),)
    return tuple(
        f"{number} of {arm.planned} {what}"
        for number, what in ((arm.diverged, "diverged"), (arm.failed, "failed"))
        if number
    )


def row_label(arm: ArmResult) -> str:
    """Return an arm's name as it stands beside a row, with what it has lost below."""
    told = [f"({words})" for words in describe_lost_runs(arm)]
    return "\n".join([wrap(arm.arm.name, LETTERS_OF_ROW), *told])
