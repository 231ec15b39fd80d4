"""Accuracy by hand, beside that of the most frequent target."""

import pytest
import torch

from lightning_moevlm.contracts.step_records import ObjectiveOutput, Predictions
from lightning_moevlm.model.metrics.tasks.accuracy import Accuracy


def output(predicted: list[int], target: list[int]) -> ObjectiveOutput:
    return ObjectiveOutput({}, {"text": Predictions(torch.tensor(predicted), torch.tensor(target))}, (), 0)


def test_both_are_over_the_predictions_of_all_batches() -> None:
    measure = Accuracy({"text": 4, "image": 2})
    measure.update(output([1, 0, 2], [1, 1, 2]))
    measure.update(output([3, 3], [3, 1]))
    # 1, 2 and 3 are right; three of five targets are 1
    assert measure.compute("val").values == {"val/accuracy_text": 3 / 5, "val/majority_text": 3 / 5}
    measure.reset()
    assert measure.compute("val").values == {}


def test_counts_are_exact_under_every_default_dtype() -> None:
    # 257 hits, and 343 targets of 600 are 1: bf16 has no 257
    measure = Accuracy({"text": 2})
    torch.set_default_dtype(torch.bfloat16)
    try:
        measure.update(output([0] * 600, [0] * 257 + [1] * 343))
        values = measure.compute("val").values
    finally:
        torch.set_default_dtype(torch.float32)
    assert values["val/accuracy_text"] == pytest.approx(257 / 600, rel=1e-12)
    assert values["val/majority_text"] == pytest.approx(343 / 600, rel=1e-12)
