"""Output z-loss: keeps the normaliser of the output softmax near 1, so that output logits do not drift.

    loss = mean over masked positions of (logsumexp over classes of the output logits)^2,   averaged over heads

PaLM (arXiv 2204.02311, training setup, weight 1e-4); Chameleon (arXiv 2405.09818, stability, weight 1e-5). It is of
heads that predict classes; a head that predicts pixels has no softmax.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moevlm.contracts.schedules import Schedule
from lightning_moevlm.model.losses.loss_input import StepSize


@dataclass(frozen=True)
class OutputZ:
    """Output z-loss.

    Args:
        weight: PaLM uses 1e-4.
    """

    weight: Schedule = 1e-4

    def __call__(self, log_partitions: Mapping[str, Tensor]) -> Tensor | None:
        """Return the raw loss, given each class-predicting term's logsumexp; None where a batch has no such term."""
        if not log_partitions:
            return None
        return torch.stack([output_z(log_partition_M) for log_partition_M in log_partitions.values()]).mean()

    def in_step(self, log_partitions: Mapping[str, Tensor], step: StepSize) -> Tensor | None:
        """Return the part of a batch in the loss of its step, times the number of parts; None where it has no part."""
        own = [
            output_z_sums(value_M)[0] / step.size.predictions[term].clamp(min=1)
            for term, value_M in log_partitions.items()
        ]
        return torch.stack(own).sum() * step.num_parts / step.num_heads.clamp(min=1) if own else None


def output_z_sums(log_partition_M: Tensor) -> Tensor:
    """Return the sum of the squares of logsumexps, and their number: (2,)."""
    squares = log_partition_M.square().sum()
    return torch.stack([squares, torch.full_like(squares, log_partition_M.shape[0])])


def output_z(log_partition_M: Tensor) -> Tensor:
    """Return the mean square of logsumexps, a scalar fp32 tensor; 0 where nothing was masked."""
    return log_partition_M.square().sum() / max(1, log_partition_M.shape[0])
