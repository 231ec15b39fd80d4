"""Settings that people combine with any adopted model: families, precisions, losses, predictions."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch, join_chats
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.data.text.chat import ChatMaker, ChatOptions, Turn
from lightning_moevlm.model.backbones.adopted.images import ImageInputs
from lightning_moevlm.model.backbones.features import pool_features
from lightning_moevlm.model.backbones.model_costs import model_card
from lightning_moevlm.model.dispatch import Capacity, LoopDispatcher
from lightning_moevlm.model.losses import AuxiliaryLosses
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.model.routers import SigmoidBiasRouter, TopKRouter
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks.recording.frozen_routing import FrozenRouting
from tests.model.backbones.adopted.small_chat import LLAVA_CHAT, save_llava
from tests.model.backbones.adopted.small_hugging_face import OLMOE, QWEN, TEXT, small_hugging_face
from tests.small_model import default_dtype, pair_batch
from tests.training.small_fit import fit

SIZES = {name: size for name, size in TEXT.items() if name != "num_experts_per_tok"}

GEMMA: dict[str, Any] = {
    "model_type": "gemma4",
    "text_config": SIZES | {
        "enable_moe_block": True, "top_k_experts": 2, "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 4, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16,
    },
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
    },
    "audio_config": None,
}  # fmt: skip


def test_layers_of_gemma_have_heads_of_two_sizes() -> None:
    model = small_hugging_face(GEMMA)
    costs = model.costs({Modality.IMAGE: 16, Modality.TEXT: 8})
    assert costs.attention == 4 * 24**2 * (4 * 8 + 4 * 16)
    assert model_card(model).active_flops_per_sample > costs.attention


def test_positions_of_patches_are_its_processors() -> None:
    batch = pair_batch()
    with pytest.raises(UserError, match=r"set data\.chat\.processor to the directory"):
        small_hugging_face(GEMMA)(*batch[:3])
    assert small_hugging_face(GEMMA)(None, *batch[1:3]).plans


def test_a_router_of_probabilities_has_no_logits_to_keep_small() -> None:
    model = small_hugging_face(GEMMA)
    with pytest.raises(
        UserError, match=r"losses\.router_z keeps logits small, and the router of this model gives prob"
    ):
        VisionLanguageModule(model, NextToken)
    VisionLanguageModule(model, NextToken, losses=AuxiliaryLosses(router_z=None))
    ours = small_hugging_face(GEMMA, router=partial(TopKRouter, top_k=2))
    VisionLanguageModule(ours, NextToken)


def test_a_target_of_choices_that_compute_needs_free_experts() -> None:
    with pytest.raises(
        UserError, match=r"set router\.target_k to null, or moe\.free, which models of transformers lack"
    ):
        small_hugging_face(OLMOE, router=partial(SigmoidBiasRouter, top_k=2, target_k=1.0))


def test_float64_needs_another_back_end_than_grouped_mm() -> None:
    batch = pair_batch()
    with pytest.raises(UserError, match="grouped_mm, in which transformers runs the experts, takes no float64"):
        small_hugging_face(QWEN).double()(*batch[:3])
    narrow, eager = (small_hugging_face(QWEN, experts_backend="eager") for _ in range(2))
    ours = small_hugging_face(QWEN, dispatcher=LoopDispatcher())
    expected = narrow(*batch[:3]).tokens_BSD
    for model in (eager, ours):
        found = model.double()(*batch[:3]).tokens_BSD
        assert found.dtype is torch.float64
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


def test_images_are_scaled_in_fp32_under_bf16_true() -> None:
    """Lightning changes the default dtype within a step; a mean of 0.48 would be rounded to three digits."""
    inputs = ImageInputs(16, 4, 2, 2, mean=(0.481, 0.458, 0.408), std=(0.269, 0.261, 0.276))
    images_BRYX = pair_batch().images_BRYX
    assert images_BRYX is not None
    expected = inputs(images_BRYX, torch.float32)["pixel_values"]
    with default_dtype(torch.bfloat16):
        assert torch.equal(inputs(images_BRYX, torch.float32)["pixel_values"], expected)


def test_features_of_conversations_are_those_of_what_the_model_reads(tmp_path: Path) -> None:
    maker = ChatMaker(ChatOptions(str(save_llava(tmp_path))))
    batch = pair_batch()
    assert batch.images_BRYX is not None and batch.text_BL is not None and batch.text_mask_BL is not None
    image = batch.images_BRYX[0].permute(1, 2, 0).numpy()
    asked = [maker.make([image], [Turn("what?", "a cat")])[0], maker.make([], [Turn("one and one?", "two")])[0]]
    mixed = Batch(batch.images_BRYX[:1], batch.text_BL[:2], batch.text_mask_BL[:2], ("a", "b"), 1, chats=tuple(asked))
    model = small_hugging_face(LLAVA_CHAT)
    features = pool_features(model, mixed)
    assert list(features) == ["pair", "text"]
    for chat, found in zip(asked, features.values(), strict=True):
        torch.testing.assert_close(found, model.read_chats(join_chats([chat])).tokens_BSD.mean(dim=1))


ERNIE: dict[str, Any] = {
    "model_type": "ernie4_5_vl_moe",
    "text_config": TEXT | {
        "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": [16, 8],
        "mlp_layer_types": ["sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_merge_size": 2, "in_channels": 3,
    },
}  # fmt: skip


def train_frozen(config: dict[str, Any], **options: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Train by the choices of the first step's weights; return experts of the first layer in each step, and weights."""
    module = VisionLanguageModule(
        small_hugging_face(config, **options), NextToken, optimizer=partial(AdamW, lr=1e-2),
    )  # fmt: skip
    outputs = fit(module, 3, batches=[pair_batch()] * 3, callbacks=[FrozenRouting(1)]).outputs
    return [step["plans"][0].plan.expert_N for step in outputs], module.state_dict()


@pytest.mark.parametrize("router", [None, partial(TopKRouter, top_k=2, renormalise=True)], ids=["theirs", "ours"])
def test_earlier_choices_hold_where_layers_run_again(router: Any) -> None:
    chosen, plain = train_frozen(QWEN, router=router)
    again, checkpointed = train_frozen(QWEN, router=router, gradient_checkpointing=True)
    assert torch.equal(chosen[0], chosen[2]) and torch.equal(again[0], again[2])
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_earlier_choices_hold_for_experts_of_one_modality() -> None:
    first, _, last = train_frozen(ERNIE, capacity=Capacity(train_factor=0.5, priority="token"))[0]
    assert torch.equal(first, last)
