"""Pinned dtypes prove that they act; those that change no bit here, or cannot act, are distinguished."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.precision import PrecisionPolicy, Simulation
from lightning_moevlm.model.routers import FixedRouter, HashRouter, SoftRouter, TopKRouter
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import Liveness
from tests.small_model import small_vl_moe
from tests.training.callbacks.asked_run import NO_LOSSES, asked, module_of, refused


def test_pinned_dtypes() -> None:
    receipts, _ = asked(module_of())
    assert receipts["precision.router"] == "idle: float32 is the dtype around it anyway (step 0)"
    policy = PrecisionPolicy(router="bfloat16", experts="bfloat16", optimizer_state="bfloat16", simulate=Simulation())
    receipts, points = asked(module_of(precision=policy), steps=2)
    for region in ("router", "experts"):
        assert receipts[f"precision.{region}"].startswith("alive: bfloat16 instead of float32 moves router logits")
    states = points[metric_keys.LIVENESS.key(switch="precision.optimizer_state")]
    assert receipts["precision.optimizer_state"] == f"alive: all {states[0][1]:.0f} state tensors are bfloat16 (step 1)"
    mixed, _ = asked(module_of(), precision="bf16-mixed")
    assert mixed["precision.router"].startswith("alive: float32 instead of bfloat16 moves router logits by up to ")


class InFp32(TopKRouter):
    """Computes in fp32 under every policy."""

    def forward(self, inputs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return super().forward(inputs._replace(tokens_TD=inputs.tokens_TD.float()))


def test_a_dtype_that_a_layer_ignores_is_dead() -> None:
    policy = PrecisionPolicy(router="bfloat16", losses=None)
    module = module_of(router=InFp32, precision=policy)
    receipts, _ = asked(module)
    # tokens are cast on their way into the region, whatever the router does with them then
    assert receipts["precision.router"].startswith("alive: ")
    module = module_of(router=FixedRouter, precision=policy)
    refused(module, "precision.router", "changes no bit of these samples, nor does float8_e5m2 on a trial")


@pytest.mark.parametrize(
    ("precision", "scale"),
    [
        ("32-true", True),
        ("32-true", False),
        ("bf16-true", True),
        ("16-true", True),
        # scale and precision meet above, each with every format
        pytest.param("bf16-true", False, marks=pytest.mark.slow),
        pytest.param("16-true", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_rounded_state_of_every_format_is_alive(dtype: Any, scale: bool, precision: str) -> None:
    # scaled by 448 / peak, rounded and scaled back, a number of fp8 may differ from itself in the last bit of fp32
    policy = PrecisionPolicy(optimizer_state=dtype, simulate=Simulation(scale=scale))
    module = module_of(precision=policy, optimizer=partial(AdamW, lr=1e-3, eps=1e-4))
    receipts, _ = asked(module, steps=2, precision=precision)
    assert receipts["precision.optimizer_state"].startswith("alive: all ")


def test_the_state_of_an_optimiser_that_is_not_rounded_is_dead() -> None:
    policy = PrecisionPolicy(optimizer_state="bfloat16", simulate=Simulation())
    module = module_of(precision=policy)

    class Unrounds(Liveness):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            for state in trainer.optimizers[0].state.values():
                state["exp_avg"].fill_(1 / 3)

    refused(module, "precision.optimizer_state", "do not hold numbers of bfloat16", steps=2, callback=Unrounds(1))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_dtype_that_changes_no_bit_here_is_idle(precision: str) -> None:
    # the norms of these blocks get fp32 tokens under autocast, and a norm of bf16 tokens is computed in fp32 anyway
    policy = PrecisionPolicy(norms="float32")
    receipts, points = asked(module_of(precision=policy), precision=precision)
    told = receipts["precision.norms"]
    assert told.startswith("idle: float32 instead of bfloat16 changes no bit of these samples; on a trial float8_e5m2 ")
    assert points[metric_keys.LIVENESS.key(switch="precision.norms")] == [(0, 0.0)]


@pytest.mark.parametrize("router", [TopKRouter, SoftRouter])
@pytest.mark.parametrize("region", ["heads", "experts"])
def test_weights_that_stay_fp32_under_bf16_true_are_checked_too(region: str, router: Any) -> None:
    module = module_of(router=router, precision=PrecisionPolicy(**{region: "float32"}))  # type: ignore[arg-type]
    receipts, _ = asked(module, precision="bf16-true")
    assert receipts[f"precision.{region}"].startswith("alive: float32 instead of bfloat16 moves router logits by ")


class RunsNoExperts(MoEFFN):
    """Routes, and gives back nothing."""

    def _run(self, plan: Any, tokens_TD: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tokens_TD)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_dtype_that_nothing_computes_in_is_dead(precision: str) -> None:
    dtype = "float32" if precision != "32-true" else "bfloat16"
    module = module_of(precision=PrecisionPolicy(experts=dtype))
    for layer in module.backbone.modules():
        if isinstance(layer, MoEFFN):
            layer.__class__ = RunsNoExperts
    refused(module, "precision.experts", "nor does float8_e5m2", "precision.experts to null", precision=precision)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("router", [FixedRouter, HashRouter, None], ids=["fixed", "hash", "dense"])
def test_the_default_pin_of_a_router_that_computes_nothing_is_off(
    precision: str, router: Callable[[int, int], Any] | None
) -> None:
    backbone = small_vl_moe(router=router, sparse_modalities=("image", "text") if router else ())
    receipts, _ = asked(VisionLanguageModule(backbone, losses=NO_LOSSES), precision=precision)
    assert receipts["precision.router"].startswith("off: the default of a region in which this model computes nothing")


class OverflowsInBf16(TopKRouter):
    """Gives no numbers where the precision is not left alone."""

    def forward(self, inputs: Any) -> PairPlan:
        plan = super().forward(inputs)
        is_narrow = inputs.tokens_TD.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        return plan._replace(weight_N=plan.weight_N * torch.inf) if is_narrow else plan


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_dtype_without_which_the_loss_is_no_number_is_alive(precision: str) -> None:
    receipts, points = asked(module_of(router=OverflowsInBf16), precision=precision)
    told = "alive: float32 instead of bfloat16: without the pin the loss is not finite (step 0)"
    assert receipts["precision.router"] == told
    assert metric_keys.LIVENESS.key(switch="precision.router") not in points
