"""Computes the losses of an optimiser step over all its micro-batches and ranks."""

from collections.abc import Sequence

import torch

from lightning_moevlm.contracts.step_records import LossReport, Term
from lightning_moevlm.model.metrics.running_sums import RunningSums


def losses_of_step(reports: Sequence[LossReport], num_ranks: int) -> LossReport:
    """Return the terms of the joined batch; a loss that does not add up is the mean over micro-batches and ranks.

    All ranks must call it together. After a resume within a step they cover the rest of the step.

    Args:
        reports: of the step's micro-batches on this rank.
        num_ranks: ranks, each with as many reports.
    """
    sums = RunningSums[tuple[bool, str]]()
    for report in reports:
        for is_task, terms in ((True, report.task), (False, report.auxiliary)):
            for name, term in terms.items():
                raw = (term.raw if term.in_step is None else term.in_step).double()
                weight = torch.as_tensor(term.weight).to(raw)
                sums.add((is_task, name), torch.stack([raw, weight, torch.ones_like(raw)]))
    num_parts = len(reports) * num_ranks
    found = {of: Term(raw / num_parts, weight / count) for of, (raw, weight, count) in sums.totals().items()}
    return LossReport(
        {name: term for (is_task, name), term in found.items() if is_task},
        {name: term for (is_task, name), term in found.items() if not is_task},
    )
