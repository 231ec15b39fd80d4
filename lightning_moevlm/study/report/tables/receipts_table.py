"""What switches have proved of themselves while they ran: `receipt/<switch>` tags of the runs, gathered by arm."""

from collections import Counter

from lightning_moevlm.study.compare.results import ArmResult, StudyResult
from lightning_moevlm.study.report.tables.table import NOTHING, Table

RECEIPT = "receipt/"
NO_RECEIPT = "no receipt"
ALIVE = "alive"


def receipts_table(result: StudyResult) -> Table | None:
    """Return every switch's receipt in every arm, or None where no run has one; what is not alive is told in words."""
    switches = dict.fromkeys(
        tag for arm in result.arms for run in arm.runs for tag in run.tags if tag.startswith(RECEIPT)
    )
    if not switches:
        return None
    rows = tuple((switch.removeprefix(RECEIPT), *(_cell(arm, switch) for arm in result.arms)) for switch in switches)
    notes = (
        "a switch of an arm proves that it acts while the run goes on; –: the arm has none. (k of n): k of n runs "
        "say so. Every run keeps the evidence as a tag.",
        *(note for switch in switches for arm in result.arms for note in _in_words(arm, switch)),
    )
    columns = ("switch", *(arm.arm.name for arm in result.arms))
    return Table("Receipts: switches that have proved to act", columns, rows, notes)


def _describe(arm: ArmResult, switch: str) -> list[tuple[str, str]]:
    """Return verdict and evidence of every run that has begun; none where no run has the switch."""
    started = [run for run in arm.runs if run.tags]
    if not any(switch in run.tags for run in started):
        return []
    told = [run.tags.get(switch, NO_RECEIPT).partition(": ") for run in started]
    return [(verdict, evidence) for verdict, _, evidence in told]


def _cell(arm: ArmResult, switch: str) -> str:
    told = _describe(arm, switch)
    counts = Counter(verdict for verdict, _ in told)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{verdict} ({count} of {len(told)})" for verdict, count in counts.items()) or NOTHING


def _in_words(arm: ArmResult, switch: str) -> list[str]:
    first = {verdict: evidence for verdict, evidence in reversed(_describe(arm, switch)) if verdict != ALIVE}
    name = f"{arm.arm.name}, {switch.removeprefix(RECEIPT)}"
    return [f"{name}: {verdict}{evidence and f', {evidence}'}." for verdict, evidence in first.items()]
