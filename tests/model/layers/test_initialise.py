"""Initial weights belong to a name: arms share them wherever name and shape agree."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_moevlm.model import initial_weights
from lightning_moevlm.model.backbones import LIMoE, VLMoE
from lightning_moevlm.model.experts import GatedExperts, MLPExperts
from lightning_moevlm.model.initial_weights import defer_initialisation, derive_seed
from lightning_moevlm.model.layers import (
    Attention,
    Block,
    DenseFFN,
    MoEFFN,
    MultiwayFFN,
    PatchEmbedding,
    TextEmbedding,
    initialise,
)
from lightning_moevlm.model.layers.layer_scale import LayerScale
from lightning_moevlm.model.objectives import MaskedModelling
from lightning_moevlm.model.routers import SoftRouter, TopKRouter
from lightning_moevlm.training import VisionLanguageModule
from tests.model.routers.test_routers import ROUTERS
from tests.small_model import small_vl_moe


def test_arms_share_every_weight_of_equal_name_and_shape() -> None:
    moe = dict(small_vl_moe().named_parameters())
    dense = dict(small_vl_moe(sparse_modalities=()).named_parameters())
    shared = {name for name in moe.keys() & dense.keys() if moe[name].shape == dense[name].shape}
    assert all(torch.equal(moe[name], dense[name]) for name in shared)
    assert set(moe) - shared == {name for name in moe if "router" in name or "experts" in name}


def test_seeds_differ_and_repeat() -> None:
    one, again, two = (dict(small_vl_moe(seed=seed).named_parameters()) for seed in (1, 1, 2))
    name = "blocks.0.attention.out.weight"
    assert torch.equal(one[name], again[name]) and not torch.equal(one[name], two[name])


def test_experts_do_not_start_equal() -> None:
    # LibMoE seeds every expert alike, so nothing breaks their symmetry
    stack = dict(small_vl_moe().named_parameters())["blocks.1.ffn.image.experts.up_EDF"]
    assert not torch.equal(stack[0], stack[1])


def test_scales() -> None:
    linear, norm = torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)
    for module in (linear, norm):
        torch.nn.init.constant_(module.weight, 7)
        initialise(module, seed=0, std=0.02)
    assert torch.equal(norm.weight, torch.ones(64)) and torch.equal(linear.bias, torch.zeros(64))
    assert 0.015 < float(linear.weight.detach().std()) < 0.02 and float(linear.weight.detach().abs().max()) <= 0.04


def test_seed_is_the_same_on_every_machine() -> None:
    # sha256("0/train/7"), first 8 bytes, big-endian, halved
    assert derive_seed(0, "train", 7) == int.from_bytes(bytes.fromhex(SHA256_0_TRAIN_7), "big") >> 1


SHA256_0_TRAIN_7 = "78ef58397814c012"


def vl_moe() -> VLMoE:
    return VLMoE(32, 2, 4, 1, 64, image_size=16, patch_size=8, vocab_size=300, max_text_len=8)


class OwnRouter(TopKRouter):
    """A router of another package, with a parameter of its own."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)
        self.own_ED = nn.Parameter(torch.empty(num_experts, dim))


BUILT_IN_A_SCRIPT: dict[str, Callable[[], nn.Module]] = {
    **ROUTERS,
    "soft": lambda: SoftRouter(16, 8),
    "own": lambda: OwnRouter(16, 8),
    "MLP experts": lambda: MLPExperts(16, 8),
    "gated experts": lambda: GatedExperts(16, 8),
    "MoE": lambda: MoEFFN(16, shared=MLPExperts),
    "dense": lambda: DenseFFN(16, 32),
    "multiway": lambda: MultiwayFFN(DenseFFN(16, 32), MoEFFN(16)),
    "attention": lambda: Attention(16, 2),
    "block": lambda: Block(16, Attention(16, 2), MoEFFN(16)),
    "patches": lambda: PatchEmbedding(16, 16, 8),
    "frozen patches": lambda: PatchEmbedding(16, 16, 8, is_frozen=True),
    "texts": lambda: TextEmbedding(16, 300, 8),
    "layer scale": lambda: LayerScale(16, 0.1),
    "VL-MoE": vl_moe,
    "LIMoE": lambda: LIMoE(32, 2, 4, 64, image_size=16, patch_size=8, vocab_size=300, max_text_len=8),
    "objective": lambda: MaskedModelling(vl_moe().spec),
}


@pytest.fixture
def unset_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch then fills what `torch.empty` returns
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unset_memory_is_nan")
@pytest.mark.parametrize("name", BUILT_IN_A_SCRIPT)
def test_a_module_is_ready_when_it_is_constructed(name: str) -> None:
    assert torch.empty(1).isnan()
    built, same = BUILT_IN_A_SCRIPT[name](), BUILT_IN_A_SCRIPT[name]()
    for module in (built, same):
        for path, value in module.state_dict().items():
            assert value.isfinite().all() and value.abs().max() <= 10, path
    initialise(same, seed=0)
    assert all(torch.equal(one, other) for one, other in zip(built.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("seed", [0, 3])
def test_a_backbone_alone_starts_as_it_does_in_training(seed: int) -> None:
    alone, module = vl_moe(), VisionLanguageModule(vl_moe(), seed=seed)
    objective = MaskedModelling(alone.spec)
    if seed != 0:
        initialise(alone, seed)
        initialise(objective, seed)
    for part, trained in ((alone, module.backbone), (objective, module.objective)):
        assert part.state_dict().keys() == trained.state_dict().keys()
        assert all(torch.equal(one, other) for one, other in zip(part.parameters(), trained.parameters(), strict=True))


def test_a_model_is_drawn_once_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Size] = []
    draw = initial_weights._drawn

    def counted(shape: torch.Size, *arguments: object) -> Tensor:
        drawn.append(shape)
        return draw(shape, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(initial_weights, "_drawn", counted)
    model = vl_moe()
    matrices = [parameter for name, parameter in model.named_parameters() if "norm" not in name and "bias" not in name]
    assert len(drawn) == len(matrices)
    with defer_initialisation():
        undrawn = vl_moe()
    assert len(drawn) == len(matrices)
    VisionLanguageModule(undrawn)
    drawn.clear()
    with torch.device("meta"):  # as a plan counts parameters
        VLMoE(moe=lambda dim: MoEFFN(dim, num_experts=128))
    assert not drawn


def test_the_class_of_a_module_tells_its_options() -> None:
    import inspect

    assert list(inspect.signature(TopKRouter).parameters)[:3] == ["dim", "num_experts", "top_k"]
