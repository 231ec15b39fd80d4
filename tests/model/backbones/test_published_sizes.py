"""Parameter counts of the families beside published ones, on the meta device."""

from functools import partial

import pytest
import torch

from lightning_moevlm.model.backbones import Backbone, LIMoE, ModelCard, MoEDecoder, MoMa, VLMoE, model_card
from lightning_moevlm.model.backbones.placement import LastBlocks
from lightning_moevlm.model.experts import GatedExperts, MLPExperts
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.routers import ExpertChoiceRouter, TopKRouter

BASE = partial(VLMoE, sparse_top=True)
LARGE = partial(VLMoE, dim=1024, num_heads=16, num_blocks=24, num_vl_blocks=3, hidden_dim=4096, sparse_top=True)


def mixture(num_experts: int, hidden_dim: int) -> partial[MoEFFN]:
    return partial(MoEFFN, num_experts=num_experts, experts=partial(MLPExperts, hidden_dim=hidden_dim))


def count(build: partial[Backbone]) -> ModelCard:
    with torch.device("meta"):
        return model_card(build())


def test_the_dense_twins_of_vl_moe_are_vlmo() -> None:
    # 175 M and 562 M: the repository of VLMo (microsoft/unilm), whose vocabulary is BERT's
    for build, published in (
        (partial(BASE, moe=mixture(32, 3072)), 175e6),
        (partial(LARGE, moe=mixture(16, 4096)), 562e6),
    ):
        card = count(partial(build, sparse_modalities=(), vocab_size=30_522))
        assert card.total_parameters == card.active_parameters == pytest.approx(published, rel=0.01)


def test_large_by_hand() -> None:
    # No count of VL-MoE LARGE is published that we know of. In millions: attention 24 x 4.19, feed-forwards 8.39 each:
    # 24 dense, 12 x 2 x 16 experts, 3 for pairs; words 65.5
    card = count(partial(LARGE, moe=mixture(16, 4096)))
    assert card.total_parameters == pytest.approx((24 * 4.19 + (24 + 12 * 2 * 16 + 3) * 8.39 + 65.5) * 1e6, rel=0.01)
    assert card.active_parameters == pytest.approx(562e6 + (64_000 - 30_522) * 1024, rel=0.01)


@pytest.mark.parametrize(("num_experts", "published"), [(32, 979.0e6), (1, 100.5e6)])
def test_limoe_b16_is_v_moe_b16(num_experts: int, published: float) -> None:
    # V-MoE-B/16 "Every 2" and ViT-B/16 (notes on arXiv 2106.05974). We know of no published count of LIMoE-B/16 itself;
    # its tower is V-MoE's, with words in place of 18,291 classes
    card = count(partial(LIMoE, vocab_size=18_291, moe=mixture(num_experts, 3072)))
    assert card.total_parameters == pytest.approx(published, rel=0.01)


def test_limoe_h14_has_the_published_size() -> None:
    # 5.6 B, 675 M of them at work (notes on arXiv 2206.02770, which was not at hand); with 32 experts this is 12
    # sparse blocks
    card = count(
        partial(
            LIMoE, dim=1280, num_heads=16, num_blocks=32, hidden_dim=5120, patch_size=14, vocab_size=32_000,
            max_text_len=16, moe=mixture(32, 5120), moe_placement=LastBlocks(12),
        )
    )  # fmt: skip
    assert card.total_parameters == pytest.approx(5.6e9, rel=0.05)
    assert card.active_parameters == pytest.approx(675e6, rel=0.05)


@pytest.mark.parametrize(
    ("dim", "num_heads", "num_blocks", "dense", "sparse"),
    [(512, 8, 8, 90e6, 210e6), (1024, 16, 24, 435e6, 1.9e9), (2048, 16, 24, 1.4e9, 7.1e9)],
)
def test_moma_has_the_published_sizes(dim: int, num_heads: int, num_blocks: int, dense: float, sparse: float) -> None:
    # arXiv 2407.21770, table 1: dense and with 8 experts in all. They count an output matrix beside the embedding
    router = partial(ExpertChoiceRouter, score="sigmoid")
    experts = partial(GatedExperts, hidden_dim=round(4 * dim * 2 / 3))  # SwiGLU, as costly as a feed-forward of 4 D
    build = partial(MoMa, dim=dim, num_heads=num_heads, num_blocks=num_blocks, hidden_dim=4 * dim)
    output = 65_536 * dim
    for is_grouped, num_experts in ((True, 4), (False, 8)):
        moe = partial(MoEFFN, num_experts=num_experts, router=router, experts=experts)
        card = count(partial(build, moe=moe, is_grouped=is_grouped))
        assert card.total_parameters + output == pytest.approx(sparse, rel=0.05)
    twin = count(partial(build, moe=moe, is_grouped=is_grouped, is_sparse=False))
    assert twin.total_parameters + output == pytest.approx(dense, rel=0.06)  # 1.48 B where they print 1.4 B


def test_moe_llava_has_the_published_size() -> None:
    # arXiv 2401.15947, table 1: 5.3 B, 3.6 B active. That is the language model: Phi-2 has 2.78 B, and three more
    # experts in each of 16 blocks have 48 x 52.4 M. Phi-2 has an output matrix beside the embedding
    moe = partial(
        MoEFFN, num_experts=4, router=partial(TopKRouter, top_k=2), experts=partial(MLPExperts, hidden_dim=10_240)
    )
    with torch.device("meta"):
        model = MoEDecoder(moe=moe)
    assert model.vision is not None and model.connector is not None
    seeing = sum(parameter.numel() for part in (model.vision, model.connector) for parameter in part.parameters())
    assert seeing == pytest.approx(303e6 + 2560 * (1024 + 2 * 2560), rel=0.01)  # ViT-L/14, then the connector
    card = model_card(model)
    for output in (0, 51_200 * 2560):
        assert card.total_parameters - seeing + output == pytest.approx(5.3e9, rel=0.05)
        assert card.active_parameters - seeing + output == pytest.approx(3.6e9, rel=0.05)
