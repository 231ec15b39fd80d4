"""Accuracy of the best constant answer: what a model that ignores its input could reach."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MajorityAccuracy(Metric):
    """Share of the most frequent target class, found in hindsight, so no constant predictor does better.

    Args:
        num_classes: number of classes.
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False
    count_V: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("count_V", default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, target_M: Tensor) -> None:
        """Count targets, int64 class ids."""
        self.count_V += torch.bincount(target_M, minlength=self.num_classes)

    def compute(self) -> Tensor:
        """Return the share in [0, 1]; 0 before any target was seen."""
        return self.count_V.max().float() / self.count_V.sum().clamp(min=1)
