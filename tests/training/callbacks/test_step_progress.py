"""The progress bar shows the logged loss, not a share of it."""

from types import SimpleNamespace
from typing import Any

import torch

from lightning_moevlm.training.callbacks import StepProgress


class Shown:
    """A bar that keeps its updates."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def update(self, task: int, **fields: Any) -> None:
        self.fields |= fields


def test_the_loss_under_accumulation_is_the_one_of_a_batch() -> None:
    bar, shown = StepProgress(), Shown()
    bar._progress, bar._task = shown, 0  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(global_step=1, max_steps=2, log_every_n_steps=1)
    # Lightning divides what a step returns by accumulate_grad_batches, here 4
    outputs: Any = {"loss": torch.tensor(3.0), "report": SimpleNamespace(total_loss=torch.tensor(12.0))}
    bar.on_train_batch_end(trainer, None, outputs, None, 0)  # type: ignore[arg-type]
    assert shown.fields == {"completed": 1, "loss": "12.000"}
