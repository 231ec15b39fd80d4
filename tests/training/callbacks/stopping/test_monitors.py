"""Callbacks may monitor every metric that is measured; others are refused after one step."""

from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.losses import AuxiliaryLosses
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import Telemetry
from tests.small_model import pair_batch
from tests.training.small_fit import build, fit


@pytest.fixture
def module() -> VisionLanguageModule:
    return build(AuxiliaryLosses(), lr=1e-3)


def test_training_loss_and_routing_can_be_monitored(module: VisionLanguageModule, tmp_path: Path) -> None:
    routing = ModelCheckpoint(tmp_path, monitor="load_entropy/block1/image", every_n_train_steps=1, save_top_k=1)
    stop = EarlyStopping("train/task_loss", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
    steps = fit(module, 9, callbacks=[Telemetry(), stop, routing], batches=[pair_batch()]).points["train/task_loss"]
    # nothing is better by a billion, so that the second epoch, of one step each, is the last
    assert len(steps) == 2 and float(stop.best_score) == pytest.approx(steps[0][1])
    assert routing.best_model_score is not None and 0 <= float(routing.best_model_score) <= 1


def test_a_metric_that_is_not_measured_is_refused_after_one_step(module: VisionLanguageModule) -> None:
    with pytest.raises(
        UserError, match=r"EarlyStopping monitors train/tusk_loss.* did you mean train/task_loss\? choose"
    ):
        fit(module, 9, callbacks=[Telemetry(), EarlyStopping("train/tusk_loss")])


def test_before_any_validation_its_metrics_are_not_known_to_be_missing(module: VisionLanguageModule) -> None:
    fit(module, 2, callbacks=[Telemetry(), EarlyStopping("val/task_loss", check_on_train_epoch_end=False)])
    with pytest.raises(UserError, match="monitors train/loss, which"):
        fit(module, 2, callbacks=[Telemetry(), EarlyStopping("train/loss")])


class Elsewhere(Callback):
    """Logs a metric of its own from the third step on."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step > 2:
            pl_module.log("mine", 1.0)


def test_a_callback_of_another_package_may_log_a_monitored_metric(module: VisionLanguageModule) -> None:
    fit(module, 3, callbacks=[Telemetry(), Elsewhere(), EarlyStopping("mine", check_on_train_epoch_end=True)])
