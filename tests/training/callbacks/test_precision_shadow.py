"""The fp32 shadow: zero under fp32, an error under narrow dtypes, and no trace in the run."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.precision import PrecisionPolicy, Simulation
from lightning_moevlm.model.routers import Gate, NoisyTopKRouter
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import PrecisionShadow
from lightning_moevlm.training.callbacks.routing.precision_shadow import narrow_regions
from tests.small_model import small_vl_moe
from tests.training.test_precision import loader

Points = dict[int, dict[str, float]]


class Recorder(DummyLogger):
    """Keeps logged metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.points: Points = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self.points.setdefault(step, {}).update(metrics)


def train(
    policy: PrecisionPolicy, precision: str = "32-true", shadow: PrecisionShadow | None = None, steps: int = 4
) -> tuple[Points, dict[str, torch.Tensor]]:
    router = partial(NoisyTopKRouter, top_k=2, gate=Gate(jitter=0.1))
    module, logger = VisionLanguageModule(small_vl_moe(router=router), precision=policy, init_std=0.2), Recorder()
    Trainer(
        accelerator="cpu", precision=precision, max_steps=steps, callbacks=[shadow] if shadow else [], logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=2,
    ).fit(module, loader(steps, num_samples=6))  # fmt: skip
    return logger.points, module.state_dict()


def flips(point: Mapping[str, float]) -> list[float]:
    return [value for key, value in point.items() if key.startswith("shadow_flip_rate/")]


def test_fp32_has_no_flip_and_no_error() -> None:
    points, _ = train(PrecisionPolicy(), shadow=PrecisionShadow())
    assert sorted(points) == [1, 2, 4]
    for point in points.values():
        assert len(flips(point)) == 2  # one sparse block, image and text
        assert set(point.values()) == {0.0}
        assert not any(key.startswith("shadow_region") for key in point)
        assert all(metric_keys.find_metric(key) is not None for key in point)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_coarse_router_flips_and_is_named(dtype: str) -> None:
    policy = PrecisionPolicy(router=dtype, simulate=Simulation())
    points, _ = train(policy, shadow=PrecisionShadow(num_samples=6))
    errors = [point["shadow_logit_error_rms/block1/text"] for point in points.values()]
    assert min(errors) > 0
    for point in points.values():
        assert all(metric_keys.find_metric(key) is not None for key in point)
        named = {key.split("/")[1] for key in point if key.startswith("shadow_region")}
        assert named == {"router"}
        # the router is all that is narrow: alone it makes the whole error
        assert point["shadow_region_loss_error/router"] == point["shadow_loss_error"] > 0
    if dtype == "float8_e4m3fn":
        assert max(max(flips(point)) for point in points.values()) > 0
        coarse = [point["shadow_region_flip_rate/router"] for point in points.values()]
        assert max(coarse) > 0


def test_coarser_formats_err_more() -> None:
    # steps at 1: 2^-10, 2^-7, 2^-3
    errors = []
    for dtype in ("float16", "bfloat16", "float8_e4m3fn"):
        policy = PrecisionPolicy(router=dtype, simulate=Simulation())  # type: ignore[arg-type]
        points, _ = train(policy, shadow=PrecisionShadow(), steps=1)
        errors.append(points[1]["shadow_logit_error_rms/block1/image"])
    assert 4 * errors[0] < errors[1] and 4 * errors[1] < errors[2]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_real_bf16_is_measured_too(precision: str) -> None:
    points, _ = train(PrecisionPolicy(), precision, PrecisionShadow(num_samples=6), steps=1)
    (point,) = points.values()
    assert 0 < point["shadow_logit_error_rms/block1/image"] < 0.1  # noise drawn anew would give errors of order 1
    assert max(flips(point)) < 0.5
    named = {key.split("/")[1] for key in point if key.startswith("shadow_region_loss")}
    assert named == {"trunk", "attention_logits", "norms", "experts", "heads"}  # router and losses are pinned to fp32
    # experts of the only sparse block and heads come after its router
    assert point["shadow_region_logit_error_rms/experts"] == point["shadow_region_logit_error_rms/heads"] == 0.0
    assert point["shadow_region_logit_error_rms/trunk"] > 0


@pytest.mark.parametrize(
    "precision",
    # bf16-true is measured above
    ["32-true", "bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)],
)
def test_a_run_with_the_shadow_is_the_run_without(precision: str) -> None:
    policy = PrecisionPolicy(router="bfloat16", simulate=Simulation())
    _, without = train(policy, precision)
    _, state = train(policy, precision, PrecisionShadow(every_n_steps=1))
    assert all(torch.equal(without[name], state[name]) for name in without)


def test_the_random_state_is_put_back() -> None:
    states: list[torch.Tensor] = []

    class Watched(PrecisionShadow):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
        ) -> None:
            states.append(torch.get_rng_state())
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            states.append(torch.get_rng_state())

    points, _ = train(PrecisionPolicy(), shadow=Watched(every_n_steps=1), steps=1)
    assert points and torch.equal(*states)


def test_regions_that_are_not_fp32() -> None:
    assert narrow_regions(PrecisionPolicy(), "32-true") == {}
    selective = PrecisionPolicy(trunk="bfloat16", simulate=Simulation())
    found = narrow_regions(selective, "32-true")
    assert set(found) == {"trunk", "attention_logits", "norms", "experts", "heads"}
    assert found["experts"].experts == "bfloat16" and found["experts"].trunk == "float32"
    assert found["experts"].simulate == Simulation()
    assert "optimizer_state" not in narrow_regions(
        PrecisionPolicy(optimizer_state="bfloat16", simulate=Simulation()), "32-true"
    )


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"num_samples": 0}])
def test_numbers_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="of PrecisionShadow is 0: choose 1 or more"):
        PrecisionShadow(**options)  # type: ignore[arg-type]
