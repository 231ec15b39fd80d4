"""Accuracy and consistency of true-or-false statements, as NLVR2 reports them (arXiv 1811.00491, section 4).

    accuracy     share of the statements that are judged rightly, by kind
    consistency  share of the texts all of whose statements are judged rightly: one text is used with several images

The majority baseline is the more frequent truth of each kind, found in hindsight. A coin is consistent on a text of n
statements with probability 2^-n.
"""

import re

import torch

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.step_records import ObjectiveOutput
from lightning_moevlm.model.metrics.measure import Measure, Measured
from lightning_moevlm.model.metrics.running_sums import RunningSums

ALL = "all"


class StatementAccuracy(Measure):
    """Counts hits by kind and by text."""

    alone = "accuracy of statements"

    def __init__(self) -> None:
        self._kinds = RunningSums[str]()  # hits, true statements, statements
        self._texts = RunningSums[int]()  # hits, statements

    def update(self, output: ObjectiveOutput) -> None:
        """Add the statements of one batch."""
        if output.judged is not None:
            for said, truth, kind, text_id in zip(*output.judged, strict=True):
                self._kinds.add(kind, torch.tensor([said == truth, truth, True]))
                self._texts.add(text_id, torch.tensor([said == truth, True]))

    def compute(self, stage: str) -> Measured:
        """Return the scores beside their baselines; nothing without statements."""
        by_kind, by_text = self._kinds.totals(), list(self._texts.totals().values())
        if not by_text:
            return Measured()
        majority = {kind: float(max(true, number - true)) for kind, (_, true, number) in by_kind.items()}
        hits = {kind: float(sums[0]) for kind, sums in by_kind.items()}
        numbers = {kind: float(sums[2]) for kind, sums in by_kind.items()}
        hits[ALL], majority[ALL], numbers[ALL] = (sum(each.values()) for each in (hits, majority, numbers))
        values: dict[str, float] = {}
        for kind, number in numbers.items():
            part = re.sub(r"[^\w.-]", "_", kind)
            values[metric_keys.STATEMENT_ACCURACY.key(stage=stage, kind=part)] = hits[kind] / number
            values[metric_keys.STATEMENT_MAJORITY.key(stage=stage, kind=part)] = majority[kind] / number
        texts_N2 = torch.stack(by_text)
        consistent_N = texts_N2[:, 0] == texts_N2[:, 1]
        values[metric_keys.CONSISTENCY.key(stage=stage)] = float(consistent_N.double().mean())
        values[metric_keys.CHANCE_CONSISTENCY.key(stage=stage)] = float((0.5 ** texts_N2[:, 1]).mean())
        return Measured(values)

    def reset(self) -> None:
        """Forget all batches."""
        self._kinds.reset()
        self._texts.reset()
