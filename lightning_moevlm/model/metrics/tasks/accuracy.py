"""Share of right classes, beside that of the best constant answer: what a model that ignores its input could reach.

The constant answer is the most frequent target, found in hindsight, so no constant predictor does better.
"""

from collections.abc import Mapping

import torch

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.step_records import ObjectiveOutput
from lightning_moevlm.model.metrics.measure import Measure, Measured
from lightning_moevlm.model.metrics.running_sums import RunningSums


class Accuracy(Measure):
    """Counts the hits of terms that predict classes.

    Args:
        num_classes: number of classes, by term.
    """

    def __init__(self, num_classes: Mapping[str, int]) -> None:
        self._num_classes = num_classes
        self._correct = RunningSums[str]()
        self._targets = RunningSums[str]()  # by class

    def update(self, output: ObjectiveOutput) -> None:
        """Add one batch."""
        for term in self._num_classes.keys() & output.predictions.keys():
            predicted_M, target_M = output.predictions[term]
            self._correct.add(term, (predicted_M == target_M).sum())
            self._targets.add(term, torch.bincount(target_M, minlength=self._num_classes[term]))

    def compute(self, stage: str) -> Measured:
        """Return both shares; terms without predictions are left out."""
        correct, values = self._correct.totals(), dict[str, float]()
        for term, count_V in self._targets.totals().items():
            number = float(count_V.sum())
            if number:
                values[metric_keys.ACCURACY.key(stage=stage, term=term)] = float(correct[term]) / number
                values[metric_keys.MAJORITY_ACCURACY.key(stage=stage, term=term)] = float(count_V.max()) / number
        return Measured(values)

    def reset(self) -> None:
        """Forget all batches."""
        self._correct.reset()
        self._targets.reset()
