"""Metrics on held-out data depend on weights and samples, not on the batches."""

import math
from collections.abc import Callable
from typing import get_args, get_type_hints

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.step_records import ObjectiveOutput, Predictions, Term
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.losses import OWN_LOSSES, AuxiliaryLosses
from lightning_moevlm.model.metrics.tasks.accuracy import Accuracy
from lightning_moevlm.training import Evaluation, VisionLanguageModule
from lightning_moevlm.training.step.routing_counts import loss_inputs
from tests.small_model import cut, small_limoe, small_vl_moe, uneven_batch

NONE = AuxiliaryLosses(None, None)
EVERY_LOSS = {  # load needs noise, and is none of evaluation's
    name: get_args(hint)[0]
    for name, hint in get_type_hints(AuxiliaryLosses).items()
    if name in OWN_LOSSES and name != "load"
}


def measured(module: VisionLanguageModule, batches: list[Batch]) -> dict[str, float]:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    data = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.validate(module, data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def losses_without(balance: str) -> AuxiliaryLosses:
    """Every loss but one of the two that balance the load: one alone may be on."""
    chosen = {name: kind() for name, kind in EVERY_LOSS.items() if name != balance}
    return AuxiliaryLosses(**{"load_balance": None} | chosen)


@pytest.mark.parametrize(
    ("build", "without"),
    [(small_vl_moe, "cross_layer_balance"), (small_limoe, "load_balance")],
    ids=["vl_moe", "limoe"],
)
def test_evaluation_does_not_depend_on_the_batch_size(build: Callable[..., Backbone], without: str) -> None:
    losses = losses_without(without)
    module = VisionLanguageModule(build(top_k=2), losses=losses, init_std=0.3)
    whole = uneven_batch(25)
    expected = measured(module, [whole])
    assert {"val/task_loss", "val/accuracy_text", "val_loss/pair_text", "val_loss/image"} <= expected.keys()
    assert {f"val_loss/{name}" for name in EVERY_LOSS.keys() - {without}} <= expected.keys()
    for size in (1, 4, 10):
        assert measured(module, cut(whole, size)) == pytest.approx(expected, rel=2e-5)


def test_losses_of_an_evaluation_are_those_of_its_joined_batch() -> None:
    losses = losses_without("load_balance")
    module = VisionLanguageModule(small_vl_moe(), losses=losses, init_std=0.3).eval()
    batch = uneven_batch(12)
    found = measured(module, cut(batch, 5))
    with torch.no_grad():
        output = module.objective(module.backbone, batch, module.draws("val"))
        terms = losses.terms(loss_inputs(module.backbone, output.plans, {}, training=False), output.log_partitions)
    assert terms.keys() == EVERY_LOSS.keys() - {"load_balance"}
    for name, term in terms.items():
        assert found[f"val_loss/{name}"] == pytest.approx(float(term.raw), rel=1e-5), name


def test_a_mean_is_over_predictions() -> None:
    # 2 predictions of loss 3 and 6 of loss 1: (2 x 3 + 6 x 1) / 8 = 1.5; one of 8 is right
    evaluation = Evaluation("val", [Accuracy({"text": 4})], NONE)
    for raw, count, hits in ((3.0, 2, 1), (1.0, 6, 0)):
        target_M = torch.ones(count, dtype=torch.int64)
        predicted_M = torch.where(torch.arange(count) < hits, target_M, 0)
        evaluation.update(
            ObjectiveOutput(
                {"text": Term(torch.tensor(raw), 0.5, count)}, {"text": Predictions(predicted_M, target_M)}, (), 0
            ),
            [],
            num_samples=4,
        )
    values = evaluation.compute({})
    assert values["val_loss/text"] == 1.5 and values["val/task_loss"] == values["val/total_loss"] == 0.75
    assert values["val/accuracy_text"] == 1 / 8 and values["val/majority_text"] == 1.0


def test_a_loss_that_is_no_number_stays_none() -> None:
    evaluation = Evaluation("val", [], NONE)
    for raw in (float("nan"), 1.0):
        evaluation.update(ObjectiveOutput({"text": Term(torch.tensor(raw), 1.0, 2)}, {}, (), 0), [], num_samples=2)
    assert math.isnan(evaluation.compute({})["val/task_loss"])


def test_a_term_that_nothing_was_predicted_for_has_no_mean() -> None:
    evaluation = Evaluation("val", [], NONE)
    terms = {"text": Term(torch.tensor(0.0), 1.0, 0), "image": Term(torch.tensor(2.0), 1.0, 3)}
    evaluation.update(ObjectiveOutput(terms, {}, (), 0), [], num_samples=2)
    values = evaluation.compute({})
    assert "val_loss/text" not in values and values["val/task_loss"] == 2.0
