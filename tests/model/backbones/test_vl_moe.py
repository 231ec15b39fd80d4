"""VL-MoE: paths, costs, the dense twin."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones import VLMoE, model_card
from lightning_moevlm.model.dispatch import LoopDispatcher
from lightning_moevlm.model.experts import MLPExperts
from lightning_moevlm.model.layers import MoEFFN, MultiwayFFN
from tests.small_model import pair_batch, small_vl_moe


def test_sparse_blocks_are_every_second_below_the_top() -> None:
    model = small_vl_moe(num_blocks=6, num_vl_blocks=2)
    sparse = [any(isinstance(module, MoEFFN) for module in block.modules()) for block in model.blocks]
    assert sparse == [False, True, False, True, False, False]
    shared = [isinstance(block.ffn, MultiwayFFN) and block.ffn.pair is not None for block in model.blocks]
    assert shared == [False, False, False, False, True, True]


def test_each_input_takes_its_own_path() -> None:
    model, batch = small_vl_moe(), pair_batch()
    pair = model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL)
    image = model(batch.images_BRYX)
    text = model(None, batch.text_BL, batch.text_mask_BL)
    assert pair.tokens_BSD.shape == (4, 4 + 8, 32)
    assert [(plan.source, plan.block, plan.layer, plan.modalities) for plan in pair.plans] == [
        ("pair", 1, "blocks.1.ffn.image", (Modality.IMAGE,)),
        ("pair", 1, "blocks.1.ffn.text", (Modality.TEXT,)),
    ]
    assert [(plan.source, plan.modalities) for plan in image.plans] == [("image", (Modality.IMAGE,))]
    assert [(plan.source, plan.modalities) for plan in text.plans] == [("text", (Modality.TEXT,))]


@pytest.mark.parametrize("source", ["image", "text", "pair"])
def test_gradient_reaches_what_an_input_uses_and_nothing_else(source: str) -> None:
    model, batch = small_vl_moe(), pair_batch()
    inputs = {
        "image": (batch.images_BRYX, None, None),
        "text": (None, batch.text_BL, batch.text_mask_BL),
        "pair": (batch.images_BRYX, batch.text_BL, batch.text_mask_BL),
    }
    model(*inputs[source]).tokens_BSD.square().sum().backward()
    used = {
        name.split("ffn.")[1].split(".")[0]
        for name, parameter in model.named_parameters()
        if "blocks.3.ffn." in name and parameter.grad is not None
    }
    assert used == {source}
    routers = {
        name.split(".")[3]
        for name, parameter in model.named_parameters()
        if "router" in name and parameter.grad is not None
    }
    assert routers == ({"image", "text"} if source == "pair" else {source})


def test_image_and_text_meet_in_pairs() -> None:
    model, batch = small_vl_moe().eval(), pair_batch()
    other = pair_batch(seed=1)
    text = model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL).features(Modality.TEXT)
    same_text_other_image = model(other.images_BRYX, batch.text_BL, batch.text_mask_BL).features(Modality.TEXT)
    assert not torch.allclose(text, same_text_other_image)


def test_padding_does_not_reach_real_tokens() -> None:
    model, batch = small_vl_moe().eval(), pair_batch()
    other_text = torch.where(batch.text_mask_BL, batch.text_BL, 17)
    one = model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL)
    two = model(batch.images_BRYX, other_text, batch.text_mask_BL)
    valid = one.layout.valid_BS
    assert torch.equal(one.tokens_BSD[valid], two.tokens_BSD[valid])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("sparse_modalities", [("image", "text"), ("text",), ()])
def test_flops_agree_with_torch_and_with_the_twin(top_k: int, sparse_modalities: tuple[str, ...]) -> None:
    model = small_vl_moe(top_k=top_k, sparse_modalities=sparse_modalities, dispatcher=LoopDispatcher())
    batch = pair_batch()
    full = torch.ones_like(batch.text_mask_BL)  # padding would not be routed
    # attention as plain matrix products: torch's counter knows no formula for the fused CPU kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch.images_BRYX, batch.text_BL, full)
    card = model_card(model)
    assert card.active_flops_per_sample == pytest.approx(counter.get_total_flops() / batch.num_samples, rel=0.01)
    assert card.active_flops_per_sample == pytest.approx(
        model_card(small_vl_moe(top_k=top_k)).active_flops_per_sample, rel=0.01
    )


def test_parameters_by_hand() -> None:
    # of 4 experts one works: 3/4 of 2 stacks of 4 x 32 x 48, per modality, is idle
    card = model_card(small_vl_moe())
    idle = 2 * (2 * 4 * 32 * 48) * 3 / 4
    assert card.total_parameters == sum(parameter.numel() for parameter in small_vl_moe().parameters())
    assert card.active_parameters == card.total_parameters - idle


def test_base_has_the_size_of_the_paper() -> None:
    # VL-MoE BASE/32E: about 2.0 B parameters in all (a blog of its authors prints 1.9 B), 180 M of them at work.
    # By hand, in millions: attention 12 x 2.36, feed-forwards 4.72 each: 12 dense, 6 x 2 x 32 experts, 2 for pairs;
    # words 49.2
    by_hand = 12 * 2.36 + (12 + 6 * 2 * 32 + 2) * 4.72 + 49.2
    with torch.device("meta"):
        model = VLMoE(
            moe=partial(MoEFFN, num_experts=32, experts=partial(MLPExperts, hidden_dim=3072)), sparse_top=True
        )
    card = model_card(model)
    assert card.total_parameters == pytest.approx(by_hand * 1e6, rel=0.01)
    assert 1.9e9 < card.total_parameters < 2.0e9
    assert card.active_parameters == pytest.approx(180e6, rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_vl_blocks": 5}, "num_vl_blocks is 5: choose between 0 and num_blocks 4"),
        ({"top_k": 5}, "top_k is 5: choose a number between 1 and 4, the num_experts"),
    ],
)
def test_impossible_shapes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_vl_moe(**options)
