"""fp8 by torchao: converted layers, and refusals. The kernels themselves need a GPU."""

import importlib.util
import sys

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.precision import PrecisionPolicy, region_of_parameters
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import Float8Training
from lightning_moevlm.training.callbacks.float8_training import is_convertible
from tests.small_model import small_vl_moe
from tests.training.test_precision import loader

TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao (extra fp8) is not installed")


class LinearRouter(nn.Module):
    """A router as another package may write it: with a linear layer."""

    region = "router"

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(32, 16)


def chosen(policy: PrecisionPolicy = PrecisionPolicy(), heads: bool = False) -> set[str]:
    module = VisionLanguageModule(small_vl_moe(), precision=policy)
    module.backbone.add_module("extra", LinearRouter())
    regions = region_of_parameters(module)
    return {
        path for path, layer in module.named_modules() if is_convertible(layer, path, regions, module.precision, heads)
    }


def test_routers_heads_and_odd_widths_are_left_out() -> None:
    layers = {"attention.query_key_value", "attention.out"}
    dense = {f"ffn.{branch}.{part}" for branch in ("image", "text", "pair") for part in ("up", "down")}
    # width 32 and hidden 64 fit; patches of 3 * 8 * 8 = 192 numbers too; blocks 0 and 2 are dense, 1 sparse, 3 the top
    found = chosen()
    assert "backbone.extra.score" not in found
    assert "backbone.patches.project" in found
    assert {path.removeprefix("backbone.blocks.0.") for path in found if ".blocks.0." in path} == layers | {
        name for name in dense if "pair" not in name
    }
    assert {path.removeprefix("backbone.blocks.1.") for path in found if ".blocks.1." in path} == layers
    assert not any("objective" in path for path in found)
    with_heads = chosen(heads=True)
    assert with_heads - found == {"objective.text_head.0", "objective.image_head"}
    assert not is_convertible(nn.Linear(24, 32), "x", {"x.weight": "trunk"}, PrecisionPolicy(), False)
    assert is_convertible(nn.Linear(48, 32), "x", {"x.weight": "trunk"}, PrecisionPolicy(), False)


def test_a_region_pinned_to_fp32_is_left_out() -> None:
    assert chosen(PrecisionPolicy(trunk="float32")) == set()
    assert not any("objective" in path for path in chosen(PrecisionPolicy(heads="float32"), heads=True))


def fit(callback: Float8Training, precision: str = "bf16-mixed") -> VisionLanguageModule:
    module = VisionLanguageModule(small_vl_moe())
    Trainer(
        accelerator="cpu", precision=precision, max_steps=2, callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, loader(2))  # fmt: skip
    return module


def test_a_cpu_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"needs a CUDA GPU, but the Trainer runs on cpu: simulate fp8 instead"):
        fit(Float8Training())


def test_missing_torchao_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"pip install 'lightning-moevlm\[fp8\]'"):
        fit(Float8Training(emulate=True))


@TORCHAO
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_emulated_conversion_trains_and_keeps_names(recipe: str) -> None:
    callback = Float8Training(recipe=recipe, emulate=True)  # type: ignore[arg-type]
    before = VisionLanguageModule(small_vl_moe()).state_dict()
    module = fit(callback)
    assert len(callback.converted) > 10 and not any("router" in path for path in callback.converted)
    kinds = {path: type(layer).__name__ for path, layer in module.named_modules()}
    assert {kinds[path] for path in callback.converted} == {"Float8Linear"}
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert not torch.equal(
        after["backbone.blocks.0.attention.out.weight"], before["backbone.blocks.0.attention.out.weight"]
    )


@pytest.mark.gpu
@TORCHAO
def test_fp8_trains_on_a_gpu() -> None:
    module = VisionLanguageModule(small_vl_moe())
    Trainer(
        accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=2, callbacks=[Float8Training()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, loader(2))  # fmt: skip
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
