"""The policy: what may be said, what follows from null, and that one setting reaches every layer."""

import pytest
import torch
from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.layers import Attention, Block, MoEFFN
from lightning_moevlm.model.objectives import MaskedModelling
from lightning_moevlm.model.precision import (
    REGIONS,
    PrecisionPolicy,
    Simulation,
    float32_everywhere,
    region,
    region_of_parameters,
    use_precision,
)
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import small_vl_moe


def test_null_follows_the_trunk_and_the_trunk_the_trainer() -> None:
    policy = PrecisionPolicy(trunk="bfloat16", simulate=Simulation())
    assert [policy.dtype_of(name) for name in ("experts", "norms", "heads")] == ["bfloat16"] * 3
    assert policy.dtype_of("router") == policy.dtype_of("losses") == "float32"
    assert policy.dtype_of("optimizer_state") is None
    assert PrecisionPolicy().dtype_of("experts") is None
    assert policy.simulates("experts") and not policy.simulates("router") and not policy.simulates("optimizer_state")
    assert {float32_everywhere().dtype_of(name) for name in REGIONS} == {"float32"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "float8_e4m3fn"}, r"precision\.router is float8_e4m3fn.*set precision\.simulate.*Float8Training"),
        ({"optimizer_state": "bfloat16"}, r"optimizer_state is bfloat16.*dtype of the parameters.*simulate"),
    ],
)
def test_dtypes_that_no_region_computes_in_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrecisionPolicy(**options)
    PrecisionPolicy(**options, simulate=Simulation())


def test_every_layer_reads_the_policy_of_the_module() -> None:
    policy = PrecisionPolicy(norms="bfloat16")
    module = VisionLanguageModule(small_vl_moe(), precision=policy)
    kinds: set[type] = set()
    for part in module.modules():
        if hasattr(part, "precision"):
            assert part.precision is policy
            kinds.add(type(part))
    assert kinds >= {Attention, Block, MoEFFN, MaskedModelling, type(module.backbone), VisionLanguageModule}
    with use_precision(module, float32_everywhere()):
        assert module.backbone.blocks[1].precision == float32_everywhere()
    assert all(part.precision is policy for part in module.modules() if hasattr(part, "precision"))


def test_every_parameter_has_a_region() -> None:
    module = VisionLanguageModule(small_vl_moe())
    regions = region_of_parameters(module)
    assert regions.keys() >= {name for name, _ in module.named_parameters()}
    for name, expected in {
        "backbone.blocks.1.ffn.image.router.weight_ED": "router",
        "backbone.blocks.1.ffn.image.experts.up_EDF": "experts",
        "backbone.blocks.0.attention_norm.weight": "norms",
        "backbone.blocks.0.attention.query_norm.weight": "norms",
        "backbone.blocks.0.attention.out.weight": "trunk",
        "backbone.text.token.weight": "trunk",
        "objective.text_head.2.weight": "heads",
        "objective.text_head.bias_V": "heads",
    }.items():
        assert regions[name] == expected, name


@pytest.mark.parametrize("outer", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("pinned", "expected"),
    [(None, None), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_a_region_computes_in_its_dtype(
    outer: torch.dtype | None, pinned: str | None, expected: torch.dtype | None
) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with (
        torch.autocast("cpu", dtype=outer, enabled=outer is not None),
        region(PrecisionPolicy(experts=pinned), "experts", "cpu") as cast,
    ):
        assert layer(cast(x)).dtype == (expected or outer or torch.float32)
