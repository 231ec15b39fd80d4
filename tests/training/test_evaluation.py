"""What is measured on held-out data is a function of the weights and the samples: not of how they fall into batches."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_moevlm.losses import AuxiliaryLosses
from lightning_moevlm.records import Batch, LossReport, Predictions, Term
from lightning_moevlm.training import Evaluation, VisionLanguageModule
from tests.small_model import cut, small_vl_moe, uneven_batch


def measured(module: VisionLanguageModule, batches: list[Batch]) -> dict[str, float]:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    data = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.validate(module, data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    module = VisionLanguageModule(small_vl_moe(top_k=2), losses=AuxiliaryLosses(None, None), init_std=0.3)
    whole = uneven_batch(25)
    expected = measured(module, [whole])
    assert {"val/task_loss", "val/accuracy_text", "val_loss/pair_text", "val_loss/image"} <= expected.keys()
    for size in (1, 4, 10):
        assert measured(module, cut(whole, size)) == pytest.approx(expected, rel=1e-5)


def test_a_mean_is_over_predictions() -> None:
    # 2 predictions of loss 3 and 6 of loss 1: (2 x 3 + 6 x 1) / 8 = 1.5; one of 8 is right
    evaluation = Evaluation("val", {"text": 4}, small_vl_moe())
    for raw, count, hits in ((3.0, 2, 1), (1.0, 6, 0)):
        target_M = torch.ones(count, dtype=torch.int64)
        predicted_M = torch.where(torch.arange(count) < hits, target_M, 0)
        report = LossReport({"text": Term(torch.tensor(raw), 0.5, count)}, {})
        evaluation.update(report, {"text": Predictions(predicted_M, target_M)}, num_samples=4, plans=())
    values = {key: float(value) for key, value in evaluation.compute().items()}
    assert values["val_loss/text"] == 1.5 and values["val/task_loss"] == values["val/total_loss"] == 0.75
    assert values["val/accuracy_text"] == 1 / 8 and values["val/majority_text"] == 1.0


def test_a_loss_that_is_no_number_stays_none() -> None:
    evaluation = Evaluation("val", {}, small_vl_moe())
    for raw in (float("nan"), 1.0):
        evaluation.update(LossReport({"text": Term(torch.tensor(raw), 1.0, 2)}, {}), {}, num_samples=2, plans=())
    assert evaluation.compute()["val/task_loss"].isnan()


def test_a_term_that_nothing_was_predicted_for_has_no_mean() -> None:
    evaluation = Evaluation("val", {}, small_vl_moe())
    terms = {"text": Term(torch.tensor(0.0), 1.0, 0), "image": Term(torch.tensor(2.0), 1.0, 3)}
    evaluation.update(LossReport(terms, {}), {}, num_samples=2, plans=())
    values = evaluation.compute()
    assert "val_loss/text" not in values and float(values["val/task_loss"]) == 2.0
