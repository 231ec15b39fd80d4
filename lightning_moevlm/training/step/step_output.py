"""What a training step hands to callbacks."""

from typing import TypedDict

from torch import Tensor

from lightning_moevlm.contracts.step_records import AttentionLogits, LossReport, NamedPlan


class StepOutput(TypedDict):
    """Of one micro-batch (Lightning asks for a dict); all but `loss`, which is differentiated, is detached."""

    loss: Tensor
    report: LossReport
    plans: tuple[NamedPlan, ...]
    attention: tuple[AttentionLogits, ...]
    log_partitions: dict[str, Tensor]
    num_tokens: int
    num_samples: int
