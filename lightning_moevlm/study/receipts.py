"""What switches have proved of themselves while they ran: `receipt/<switch>` tags of the runs, gathered by arm."""

from collections import Counter

from lightning_moevlm.study.results import ArmResult, StudyResult
from lightning_moevlm.study.table import NOTHING, Table

RECEIPT = "receipt/"
NO_RECEIPT = "no receipt"


def receipts_table(result: StudyResult) -> Table | None:
    """Return every switch's receipt by arm, or None where no run has one."""
    rows = tuple(row for arm in result.arms for row in _rows(arm))
    if not rows:
        return None
    notes = (
        "a switch of an arm proves that it acts while the run goes on; an arm without a row has none to prove. "
        "evidence: of the first of these runs; every run keeps its own as a tag.",
    )
    columns = ("arm", "switch", "receipt", "runs", "evidence")
    return Table("Receipts: switches that have proved to act", columns, rows, notes, essential=4)


def _rows(arm: ArmResult) -> list[tuple[str, ...]]:
    started = [run for run in arm.runs if run.tags]
    switches = dict.fromkeys(tag for run in started for tag in run.tags if tag.startswith(RECEIPT))
    rows: list[tuple[str, ...]] = []
    for switch in switches:
        told = [run.tags.get(switch, NO_RECEIPT).partition(": ") for run in started]
        evidence: dict[str, str] = {}
        for verdict, _, text in told:
            evidence.setdefault(verdict, text)
        counts = Counter(verdict for verdict, _, _ in told)
        rows += [
            (
                arm.arm.name,
                switch.removeprefix(RECEIPT),
                verdict,
                f"{counts[verdict]} of {len(started)}",
                text or NOTHING,
            )
            for verdict, text in evidence.items()
        ]
    return rows
