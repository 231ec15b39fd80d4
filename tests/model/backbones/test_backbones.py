"""What every backbone keeps: costs, padding, the dense twin, causality."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones import Backbone, model_card
from lightning_moevlm.model.dispatch import Capacity, LoopDispatcher
from lightning_moevlm.model.layers import ModelStabilisers, MoEFFN
from lightning_moevlm.model.routers import (
    ExpertChoiceRouter,
    HashRouter,
    LongTailRouter,
    ReLURouter,
    SequenceTopKRouter,
    SinkhornRouter,
    TopPRouter,
)
from tests.small_model import pair_batch, small_decoder, small_limoe, small_moma, small_vl_moe

BACKBONES = {"VLMoE": small_vl_moe, "LIMoE": small_limoe, "MoMa": small_moma}
CAUSAL = BACKBONES | {"MoEDecoder": small_decoder}
TWINS: dict[str, dict[str, object]] = {"VLMoE": {"sparse_modalities": ()}}
SWITCHES = {
    "plain": ModelStabilisers(),
    "capped": ModelStabilisers(logit_cap=5.0, sub_norm=True),
}

each_backbone = pytest.mark.parametrize("name", BACKBONES)
each_causal_backbone = pytest.mark.parametrize("name", CAUSAL)


def encode(model: Backbone, text_BL: Tensor | None = None) -> Tensor:
    batch = pair_batch()
    text = batch.text_BL if text_BL is None else text_BL
    return model(batch.images_BRYX, text, batch.text_mask_BL).tokens_BSD


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize(
    ("name", "causal"), [*((name, False) for name in BACKBONES), *((name, True) for name in CAUSAL)]
)
def test_padding_never_matters(name: str, switch: str, causal: bool) -> None:
    model, batch = CAUSAL[name](stabilisers=SWITCHES[switch], causal=causal).eval(), pair_batch()
    other_text = torch.where(batch.text_mask_BL, batch.text_BL, 17)
    valid = torch.cat([torch.ones(4, 4, dtype=torch.bool), batch.text_mask_BL], dim=1)
    assert torch.equal(encode(model)[valid], encode(model, other_text)[valid])


@each_causal_backbone
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("switch", SWITCHES)
def test_flops_agree_with_torch_and_with_the_twin(name: str, top_k: int, switch: str) -> None:
    build: Callable[..., Backbone] = partial(CAUSAL[name], top_k=top_k, stabilisers=SWITCHES[switch])
    batch = pair_batch()
    full = torch.ones_like(batch.text_mask_BL)  # padding would not be routed
    cards = []
    for options in ({}, TWINS.get(name, {"is_sparse": False})):
        model = build(dispatcher=LoopDispatcher(), **options)
        # attention as plain matrix products: torch's counter knows no formula for the fused CPU kernel
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(batch.images_BRYX, batch.text_BL, full)
        card = model_card(model)
        assert card.active_flops_per_sample == pytest.approx(counter.get_total_flops() / batch.num_samples, rel=0.01)
        cards.append(card)
    sparse, dense = cards
    assert dense.active_flops_per_sample == pytest.approx(sparse.active_flops_per_sample, rel=0.01)
    assert dense.total_parameters < sparse.total_parameters


@each_backbone
def test_measuring_logits_changes_nothing_and_costs_nothing_when_off(name: str) -> None:
    model = BACKBONES[name](dispatcher=LoopDispatcher())
    batch = pair_batch()
    inputs = (batch.images_BRYX, batch.text_BL, batch.text_mask_BL)
    flops = []
    outputs = []
    for measure in (False, True, False):
        model.measure_attention = measure
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            outputs.append(model(*inputs))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[2] and outputs[0].attention == outputs[2].attention == ()
    # one product of queries and keys per block more: 2 S^2 D for each of 4 samples
    assert flops[1] - flops[0] == 4 * len(model.blocks) * 2 * 12**2 * 32
    measured = outputs[1].attention
    assert [(m.source, m.block, m.layer) for m in measured] == [
        ("pair", block, f"blocks.{block}.attention") for block in range(len(model.blocks))
    ]
    assert all(m.max_H.shape == (2,) for m in measured)
    assert torch.equal(outputs[0].tokens_BSD, outputs[1].tokens_BSD)


@each_causal_backbone
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("options", [{}, {"capacity": Capacity(1.0, 1.0)}], ids=["dropless", "limited"])
def test_causal_outputs_do_not_know_later_words(name: str, switch: str, options: dict[str, object]) -> None:
    refuse_later_words(CAUSAL[name](causal=True, stabilisers=SWITCHES[switch], **options))


@each_causal_backbone
def test_places_by_token_are_causal_with_several_experts(name: str) -> None:
    refuse_later_words(CAUSAL[name](causal=True, capacity=Capacity(0.7, 0.7, "token"), top_k=2))


@pytest.mark.parametrize("name", ["LIMoE", "MoEDecoder"])
def test_more_experts_for_rare_patches_are_causal(name: str) -> None:
    refuse_later_words(CAUSAL[name](causal=True, router=LongTailRouter))


def refuse_later_words(model: Backbone) -> None:
    """Change one word after the other: only what comes after it may change."""
    batch = pair_batch(1)
    assert batch.text_BL is not None

    def run(text_BL: Tensor) -> Tensor:
        return model(batch.images_BRYX, text_BL, batch.text_mask_BL).tokens_BSD.detach()

    base = run(batch.text_BL)
    for position in range(1, 7):
        changed = batch.text_BL.clone()
        changed[:, position:7] = (changed[:, position:7] + 100) % 290 + 10
        other = run(changed)
        seen = 4 + position  # 4 patches, then the words before the first changed one
        # an expert's matrix product may round differently with other rows beside; a leak is ten thousand times larger
        torch.testing.assert_close(other[:, :seen], base[:, :seen], rtol=0, atol=2e-6)
        assert not torch.allclose(other[:, seen], base[:, seen])
    # words see the image, and the image no word
    other_image = model(pair_batch(1, seed=1).images_BRYX, batch.text_BL, batch.text_mask_BL).tokens_BSD
    assert not torch.allclose(other_image[:, 4:], base[:, 4:])


def test_no_patch_has_the_identity_of_a_word() -> None:
    model, batch = small_limoe(router=HashRouter), pair_batch()
    hidden_BP = torch.tensor([[True, False, False, False]] * 4)
    layout = model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL, hidden_BP).layout
    assert layout.identity_BS is not None
    patches, words = layout.identity_BS[:, :4], layout.identity_BS[:, 4:]
    assert torch.equal(words, batch.text_BL)
    assert int(patches.min()) == model.spec.vocab_size  # of hidden patches, whose code is the lowest
    assert torch.equal(patches == model.spec.vocab_size, hidden_BP)


@each_backbone
def test_bidirectional_outputs_know_later_words(name: str) -> None:
    batch = pair_batch()
    assert batch.text_BL is not None
    changed = batch.text_BL.clone()
    changed[:, 5] = 11
    model = BACKBONES[name]()
    difference = (encode(model)[:, 4:8] - encode(model, changed)[:, 4:8]).abs()
    assert float(difference.detach().max()) > 2e-2  # what a leak looks like, see the causal test


@each_backbone
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"router": ExpertChoiceRouter},
            "cannot use ExpertChoiceRouter: its tokens compete for experts across positions",
        ),
        ({"router": SinkhornRouter}, "cannot use SinkhornRouter"),
        ({"router": SequenceTopKRouter}, "cannot use SequenceTopKRouter"),
        (
            {"capacity": Capacity(), "router": ReLURouter},
            "capacity with ReLURouter: the number of experts differs between its tokens",
        ),
        ({"capacity": Capacity(), "router": partial(TopPRouter, max_k=1)}, "capacity with TopPRouter"),
        ({"capacity": Capacity(priority="gate")}, "priority gate: a later token with a larger gate"),
        ({"capacity": Capacity(), "top_k": 2}, "2 experts per token: every first choice is served before any second"),
    ],
)
def test_a_causal_model_refuses_what_looks_ahead(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BACKBONES[name](causal=True, **options)
    BACKBONES[name](**options)  # bidirectional models may
    for allowed in (Capacity(None, None), Capacity(priority="token")):
        BACKBONES[name](causal=True, **({"capacity": allowed, "top_k": 2} if "top_k" in options else {}))


def test_one_mixture_serves_both_modalities_of_limoe() -> None:
    model, batch = small_limoe(), pair_batch()
    pair = model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL)
    assert [(plan.source, plan.block, plan.layer, plan.modalities) for plan in pair.plans] == [
        ("pair", block, f"blocks.{block}.ffn", (Modality.IMAGE, Modality.TEXT)) for block in (1, 3)
    ]
    assert pair.plans[0].plan.modality_T.tolist() == ([0] * 4 + [1] * 8) * 4
    assert [plan.modalities for plan in model(batch.images_BRYX).plans] == [(Modality.IMAGE,)] * 2
    layers = [module for module in model.modules() if isinstance(module, MoEFFN)]
    model(batch.images_BRYX).tokens_BSD.sum().backward()
    model(None, batch.text_BL, batch.text_mask_BL).tokens_BSD.sum().backward()
    assert all(layer.router.weight_ED.grad is not None for layer in layers) and layers[0].router.experts_per_token == 1


def test_moe_every_is_checked() -> None:
    limoe, vl_moe = type(small_limoe()), type(small_vl_moe())
    with pytest.raises(UserError, match="moe_every is 0"):
        limoe(dim=32, num_heads=2, moe_every=0)
    with pytest.raises(UserError, match="moe_every is 0"):
        vl_moe(dim=32, num_heads=2, moe_every=0, sparse_modalities=())


def test_a_model_without_a_sparse_block_is_refused_unless_it_is_dense_on_purpose() -> None:
    limoe, vl_moe = (
        partial(type(small()), dim=32, num_heads=2, num_blocks=2, hidden_dim=32, image_size=16, patch_size=8)
        for small in (small_limoe, small_vl_moe)
    )
    for build in (partial(limoe, moe_every=3), partial(vl_moe, moe_every=3, num_vl_blocks=0)):
        with pytest.raises(
            UserError, match="moe_every = 3 selects none of the 2 blocks that can be sparse; use 1 to 2"
        ):
            build()
    with pytest.raises(UserError, match="num_vl_blocks equals num_blocks, which leaves no block for experts: lower it"):
        vl_moe(num_vl_blocks=2)
    for build in (
        partial(limoe, moe_every=3, is_sparse=False),
        partial(vl_moe, num_vl_blocks=2, sparse_modalities=()),
    ):
        assert not any(isinstance(module, MoEFFN) for module in build().modules())
    assert any(isinstance(module, MoEFFN) for module in vl_moe(num_vl_blocks=2, sparse_top=True).modules())
