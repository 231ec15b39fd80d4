"""What switches have proved of themselves while they ran: `receipt/<switch>` tags of the runs, gathered by arm."""

from collections import Counter

from lightning_moevlm.study.results import ArmResult, StudyResult
from lightning_moevlm.study.table import NOTHING, Table

RECEIPT = "receipt/"


def receipts_table(result: StudyResult) -> Table | None:
    """Return every switch's receipt by arm, or None where no run has one."""
    rows = tuple(row for arm in result.arms for row in _rows(arm))
    if not rows:
        return None
    notes = ("a switch of an arm proves that it acts while the run goes on; an arm without a row has none to prove.",)
    return Table("Receipts: switches that have proved to act", ("arm", "switch", "receipt", "runs"), rows, notes)


def _rows(arm: ArmResult) -> list[tuple[str, ...]]:
    started = [run for run in arm.runs if run.tags]
    switches = dict.fromkeys(tag for run in started for tag in run.tags if tag.startswith(RECEIPT))
    return [
        (arm.arm.name, switch.removeprefix(RECEIPT), text or NOTHING, f"{count} of {len(started)}")
        for switch in switches
        for text, count in Counter(run.tags.get(switch, "no receipt") for run in started).items()
    ]
