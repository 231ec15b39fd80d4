"""The result of a training step, for callbacks."""

from typing import TypedDict

from torch import Tensor

from lightning_moevlm.contracts.step_records import AttentionLogits, LossReport, NamedPlan


class StepOutput(TypedDict):
    """One micro-batch, as the dict that Lightning requires; only `loss` is not detached."""

    loss: Tensor
    report: LossReport
    plans: tuple[NamedPlan, ...]
    attention: tuple[AttentionLogits, ...]
    log_partitions: dict[str, Tensor]
    num_tokens: int
    num_samples: int
