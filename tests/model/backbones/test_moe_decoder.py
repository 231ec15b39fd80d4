"""The MoE decoder: what its records name, what its stages share, and what it refuses."""

from functools import partial

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones import MoEDecoder, VisionOptions
from lightning_moevlm.model.objectives import Contrastive, Joint, MaskedModelling, NextToken
from lightning_moevlm.model.routers import ExpertChoiceRouter, HashRouter
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import pair_batch, small_decoder

IMAGE, TEXT = Modality.IMAGE, Modality.TEXT


def test_plans_name_their_block_layer_and_modalities() -> None:
    model, batch = small_decoder(), pair_batch()
    model.measure_attention = True
    pair, text = model(*batch[:3]), model(None, *batch[1:3])
    of_language = [(block, f"blocks.{block - 3}.ffn", (IMAGE, TEXT)) for block in (4, 6)]
    assert [(plan.block, plan.layer, plan.modalities) for plan in pair.plans] == [
        (1, "vision.blocks.1.ffn", (IMAGE,)), (2, "connector.ffn", (IMAGE,)), *of_language
    ]  # fmt: skip
    assert [(plan.source, plan.block, plan.modalities) for plan in text.plans] == [
        ("text", block, (TEXT,)) for block in (4, 6)
    ]
    assert [model.num_plans(modalities) for modalities in ((IMAGE, TEXT), (IMAGE,), (TEXT,))] == [4, 4, 2]
    assert [(each.block, each.layer) for each in pair.attention] == [
        *((block, f"vision.blocks.{block}.attention") for block in range(2)),
        *((block, f"blocks.{block - 3}.attention") for block in range(3, 7)),
    ]
    assert small_decoder(moe_every=None, sees_sparsely=False)(*batch[:3]).plans == ()


def test_a_patch_sees_every_patch_and_no_word() -> None:
    model, batch = small_decoder(), pair_batch(1)
    plain = model(*batch[:3]).tokens_BSD
    assert batch.images_BRYX is not None and batch.text_BL is not None
    last = batch.images_BRYX.clone()
    last[:, :, 8:, 8:] = 255 - last[:, :, 8:, 8:]
    assert not torch.allclose(model(last, *batch[1:3]).tokens_BSD[:, 0], plain[:, 0])
    words = model(batch.images_BRYX, batch.text_BL.flip(1), batch.text_mask_BL).tokens_BSD
    assert torch.allclose(words[:, :4], plain[:, :4], atol=1e-6)


def test_hidden_patches_say_nothing_of_the_image() -> None:
    model, batch = small_decoder(), pair_batch()
    hidden_BP = torch.ones(4, 4, dtype=torch.bool)
    assert batch.images_BRYX is not None
    seen = [model(images, *batch[1:3], hidden_BP).tokens_BSD for images in (batch.images_BRYX, 255 - batch.images_BRYX)]
    assert torch.equal(*seen)


def test_routers_that_read_identities_route_patches_in_the_tower_too() -> None:
    output = small_decoder(router=HashRouter)(*pair_batch()[:3])
    codes = [plan.plan.expert_N[:4].tolist() for plan in output.plans[:2]]
    assert codes[0] == codes[1]  # by the same patch codes


def test_a_dense_model_has_the_names_that_experts_start_from() -> None:
    dense, sparse = (dict(small_decoder(**options).named_parameters()) for options in (
        {"moe_every": None, "sees_sparsely": False}, {}
    ))  # fmt: skip
    assert {name for name in sparse if name not in dense} == {
        f"{layer}.{part}"
        for layer in ("vision.blocks.1.ffn", "connector.ffn", "blocks.1.ffn", "blocks.3.ffn")
        for part in ("router.weight_ED", "experts.up_EDF", "experts.down_EFD")
    }
    assert all(dense[name].shape == value.shape for name, value in sparse.items() if name in dense)


def test_next_tokens_reach_every_parameter_but_that_of_hidden_patches() -> None:
    module = VisionLanguageModule(small_decoder(), NextToken)
    _, report = module.train().compute_losses(pair_batch(), 0)
    report.total_loss.backward()
    assert {name for name, each in module.named_parameters() if each.grad is None} == {"backbone.vision.patches.mask_D"}


def test_objectives_are_joined_on_it() -> None:
    module = VisionLanguageModule(small_decoder(), partial(Joint, parts={"next": NextToken, "contrast": Contrastive}))
    _, report = module.train().compute_losses(pair_batch(), 0)
    report.total_loss.backward()
    assert report.task.keys() == {"next_caption", "contrast_contrastive"}
    assert {name for name, each in module.named_parameters() if each.grad is None} == {"backbone.vision.patches.mask_D"}


def test_a_sum_with_masked_modelling_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot train a causal MoEDecoder.*choose the objective NextToken"):
        VisionLanguageModule(small_decoder(), partial(Joint, parts={"masked": MaskedModelling}))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="moe_every = 5 selects none of the 4 blocks"):
        small_decoder(moe_every=5)
    with pytest.raises(UserError, match="a causal model cannot use ExpertChoiceRouter"):
        small_decoder(router=ExpertChoiceRouter)
    with pytest.raises(UserError, match="dim 24 is not a multiple of num_heads 5"):
        sizes = {"dim": 32, "num_heads": 2, "num_blocks": 2, "hidden_dim": 32, "image_size": 16, "patch_size": 8}
        MoEDecoder(**sizes, vocab_size=300, max_text_len=8, vision=VisionOptions(24, 5, 1, 32))


def test_answers_are_read_where_the_whole_question_was_seen() -> None:
    model, batch = small_decoder(), pair_batch(2)
    assert batch.text_BL is not None
    changed = batch.text_BL.clone()
    changed[:, 5] = 11
    one, other = (model(batch.images_BRYX, text, batch.text_mask_BL) for text in (batch.text_BL, changed))
    assert torch.equal(one.read_text(), one.features(TEXT)[:, 6])  # [EOS]; padding follows
    assert not torch.allclose(one.read_text(), other.read_text(), atol=1e-4)
    assert torch.allclose(one.features(TEXT)[:, 0], other.features(TEXT)[:, 0], atol=1e-6)
