"""Router saturation: 1 where routers do not move, the overlap by hand where they do, and no trace in the run."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.metrics.routing_shift import chosen_overlap
from lightning_moevlm.model.routers import Gate, NoisyTopKRouter
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import RouterSaturation
from tests.small_model import small_vl_moe
from tests.training.callbacks.test_precision_shadow import Points, Recorder
from tests.training.test_precision import loader

LAYERS = [f"block1/{modality}" for modality in ("image", "text")]


class Data(LightningDataModule):
    """Six samples, the same in training and held out."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self):
        return loader(self.steps, num_samples=6)

    def val_dataloader(self):
        return loader(1, num_samples=6)


def train(
    callback: RouterSaturation | None, steps: int = 10, frozen: bool = False, **data
) -> tuple[Points, dict[str, Tensor]]:
    router = partial(NoisyTopKRouter, top_k=2, gate=Gate(jitter=0.1))
    module, logger = VisionLanguageModule(small_vl_moe(router=router), init_std=0.2), Recorder()
    if frozen:
        module.requires_grad_(False)
        module.objective.requires_grad_(True)
    Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[callback] if callback else [], logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    ).fit(module, **(data or {"datamodule": Data(steps)}))  # fmt: skip
    return logger.points, module.state_dict()


def test_routers_settle_and_training_is_left_alone() -> None:
    points, trained = train(RouterSaturation(at=[0.1, 0.9], num_samples=4))
    found = {
        step: {k: v for k, v in point.items() if k.startswith("router_saturation")} for step, point in points.items()
    }
    assert found[1].keys() == {f"router_saturation_at_10/{layer}" for layer in LAYERS}
    assert found[9].keys() == {f"router_saturation_at_90/{layer}" for layer in LAYERS}
    for early, late in zip(found[1].values(), found[9].values(), strict=True):
        assert 0 < early < late <= 1
    assert all(metric_keys.find_metric(key) is not None for key in (*found[1], *found[9]))
    _, untouched = train(None)
    assert all(torch.equal(trained[name], untouched[name]) for name in untouched)


def test_a_router_that_does_not_move_is_saturated_from_the_start() -> None:
    points, _ = train(RouterSaturation(at=[0.5], num_samples=1), steps=2, frozen=True)
    assert points[1] == {f"router_saturation_at_50/{layer}": 1.0 for layer in LAYERS}


def test_a_resumed_run_keeps_its_early_choices() -> None:
    first, second = RouterSaturation(at=[0.1]), RouterSaturation(at=[0.1])
    train(first)
    second.load_state_dict(first.state_dict())
    points, _ = train(second)
    assert points[1] == train(RouterSaturation(at=[0.1]))[0][1]


def test_overlap_by_hand() -> None:
    chosen_TE = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]).bool()
    final_TE = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    assert float(chosen_overlap(chosen_TE, final_TE)) == pytest.approx((1 / 2 + 2 / 2) / 2)
    assert float(chosen_overlap(chosen_TE[:0], final_TE[:0])) == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [({"at": []}, "at least one share"), ({"at": [1.0]}, "at of Router"), ({"num_samples": 0}, "num_samples")],
)
def test_options_out_of_range_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        RouterSaturation(**options)


def test_a_run_without_held_out_samples_is_refused() -> None:
    with pytest.raises(UserError, match="give the trainer a data module"):
        train(RouterSaturation(), steps=2, train_dataloaders=loader(2, num_samples=6))
