"""Builds the table of receipts: each switch's proof that it acts, read from the tags `receipt/<switch>` of the runs."""

from collections import Counter

from lightning_moevlm.study.compare.results import ArmResult, StudyResult
from lightning_moevlm.study.report.tables.table import NOTHING, Table

RECEIPT = "receipt/"
NO_RECEIPT = "no receipt"
ALIVE = "alive"


def receipts_table(result: StudyResult) -> Table | None:
    """Return every switch's receipt in every arm, with the evidence of those that are not alive; None without any."""
    switches = dict.fromkeys(
        tag for arm in result.arms for run in arm.runs for tag in run.tags if tag.startswith(RECEIPT)
    )
    if not switches:
        return None
    rows = tuple((switch.removeprefix(RECEIPT), *(_cell(arm, switch) for arm in result.arms)) for switch in switches)
    notes = (
        "Each switch proves during training that it acts. –: the arm lacks the switch. (k of n): k of n runs. "
        "Every run keeps the evidence as a tag.",
        *(note for switch in switches for arm in result.arms for note in _explain(arm, switch)),
    )
    columns = ("switch", *(arm.arm.name for arm in result.arms))
    return Table("Receipts: switches that have proved to act", columns, rows, notes)


def _read_receipts(arm: ArmResult, switch: str) -> list[tuple[str, str]]:
    """Return verdict and evidence of every run that has begun; empty if no run has the switch."""
    started = [run for run in arm.runs if run.tags]
    if not any(switch in run.tags for run in started):
        return []
    receipts = [run.tags.get(switch, NO_RECEIPT).partition(": ") for run in started]
    return [(verdict, evidence) for verdict, _, evidence in receipts]


def _cell(arm: ArmResult, switch: str) -> str:
    receipts = _read_receipts(arm, switch)
    counts = Counter(verdict for verdict, _ in receipts)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{verdict} ({count} of {len(receipts)})" for verdict, count in counts.items()) or NOTHING


def _explain(arm: ArmResult, switch: str) -> list[str]:
    first = {verdict: evidence for verdict, evidence in reversed(_read_receipts(arm, switch)) if verdict != ALIVE}
    name = f"{arm.arm.name}, {switch.removeprefix(RECEIPT)}"
    return [f"{name}: {verdict}{evidence and f', {evidence}'}." for verdict, evidence in first.items()]
