"""Stabilisers of the trunk prove that they act; a part that is not used is named."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_moevlm.model.experts import ClampedGLU, GatedExperts, SiTUGLU
from lightning_moevlm.model.layers import Attention, Block, ModelStabilisers
from lightning_moevlm.training import Actions
from lightning_moevlm.training.actions import QKClip
from lightning_moevlm.training.callbacks import Liveness
from lightning_moevlm.training.callbacks.liveness.rehearsal import replace_attribute
from tests.small_model import pair_batch
from tests.training.callbacks.asked_run import asked, module_of, refused
from tests.training.small_fit import fit

STABILISERS = {
    "qk_norm": ModelStabilisers(),
    "attention_gate": ModelStabilisers(attention_gate="head"),
    "sub_norm": ModelStabilisers(sub_norm=True),
    "norm": ModelStabilisers(norm="rms", sub_norm=True),
    "norm_placement": ModelStabilisers(norm_placement="sandwich"),
    "layer_scale": ModelStabilisers(layer_scale=0.0),
    "residual_scaling": ModelStabilisers(norm_placement="post", residual_scaling="deepnorm"),
    "logit_cap": ModelStabilisers(qk_norm=False, logit_cap=0.01),
    "glu": ModelStabilisers(glu=ClampedGLU(0.01)),
    "freeze_patches": ModelStabilisers(freeze_patches=True),
    "init_scheme": ModelStabilisers(init_scheme="fan_in"),
    "init_scale": ModelStabilisers(init_scale=0.1),
}


@pytest.mark.parametrize("name", STABILISERS)
def test_stabilisers_of_the_trunk_are_alive(name: str) -> None:
    receipts, _ = asked(module_of(stabilisers=STABILISERS[name]))
    assert receipts[f"stabilisers.{name}"].startswith("alive: "), receipts


def test_other_initial_scales_are_alive() -> None:
    # GPT-2: of 4 blocks, matrices that write to the residual start at 1 / sqrt(8) of 0.1; cut at two std: x 0.88
    depth, _ = asked(module_of(stabilisers=ModelStabilisers(residual_scaling="depth")))
    assert "0.0311 with it, 0.088 without" in depth["stabilisers.residual_scaling"]
    normal, _ = asked(module_of(stabilisers=ModelStabilisers(init_scheme="normal")))
    assert "0.1 with it, 0.088 without" in normal["stabilisers.init_scheme"]
    output, _ = asked(module_of(stabilisers=ModelStabilisers(norm_placement="output")))
    assert output["stabilisers.norm_placement"].startswith("alive: ")
    resumed, _ = asked(module_of(stabilisers=ModelStabilisers(init_scheme="normal")), steps=2)
    assert resumed["stabilisers.init_scheme"].endswith("(step 0)")  # training moves them: asked once


class IgnoresNorms(Attention):
    """Has norms of queries and keys, and does not use them."""

    def forward(self, *args: Any) -> Any:
        with replace_attribute(self, "query_norm", None), replace_attribute(self, "key_norm", None):
            return super().forward(*args)


class IgnoresCap(Attention):
    """Has a cap, and does not use it."""

    def forward(self, *args: Any) -> Any:
        with replace_attribute(self, "logit_cap", None):
            return super().forward(*args)


class IgnoresGate(Attention):
    """Has a gate, and does not use it."""

    def forward(self, *args: Any) -> Any:
        with replace_attribute(self, "gate", None):
            return super().forward(*args)


class KeepsLayerNorms(Block):
    """Ignores the kind of norm, and makes LayerNorms."""

    def forward(self, *args: Any) -> Any:
        plain = nn.LayerNorm(32)
        with replace_attribute(self, "attention_norm", plain), replace_attribute(self, "ffn_norm", plain):
            return super().forward(*args)


class IgnoresScales(Block):
    """Has layer scales, and does not use them."""

    def forward(self, *args: Any) -> Any:
        with replace_attribute(self, "attention_scale", None), replace_attribute(self, "ffn_scale", None):
            return super().forward(*args)


@pytest.mark.parametrize(
    ("name", "kind", "ignoring", "word"),
    [
        ("qk_norm", Attention, IgnoresNorms, "blocks.2.attention gives the same without its query_norm"),
        ("logit_cap", Attention, IgnoresCap, "blocks.2.attention gives the same under a cap of"),
        ("attention_gate", Attention, IgnoresGate, "blocks.2.attention gives the same without its gate"),
        ("norm", Block, KeepsLayerNorms, "blocks.2 gives the same without its attention_norm"),
        ("layer_scale", Block, IgnoresScales, "blocks.2 gives the same without its attention_scale"),
    ],
)
def test_a_part_that_one_layer_does_not_use_is_dead(name: str, kind: type, ignoring: type, word: str) -> None:
    module = module_of(stabilisers=STABILISERS[name])
    layer = module.backbone.blocks[2]
    (layer if kind is Block else layer.attention).__class__ = ignoring
    refused(module, f"stabilisers.{name}", word)


class IgnoresBound(GatedExperts):
    """Has a bound, and does not use it."""

    def run(self, *args: Any) -> Any:
        with replace_attribute(self, "glu", None):
            return super().run(*args)

    def activation(self) -> None:
        return None


def test_a_bound_that_experts_do_not_use_is_dead_and_one_far_above_is_idle() -> None:
    module = module_of(stabilisers=STABILISERS["glu"])
    module.backbone.blocks[1].ffn.text.experts.__class__ = IgnoresBound
    refused(module, "stabilisers.glu", "blocks.1.ffn.text gives the same under a bound of 1e-09")
    above, _ = asked(module_of(stabilisers=ModelStabilisers(glu=ClampedGLU(1e3))))
    assert above["stabilisers.glu"].startswith("idle: without it the output of 2 feed-forwards changes by up to 0 ")
    bent, _ = asked(module_of(stabilisers=ModelStabilisers(glu=SiTUGLU(0.1, 0.1))))
    assert bent["stabilisers.glu"].startswith("alive: ")


def test_a_cap_far_above_the_logits_is_idle() -> None:
    receipts, _ = asked(module_of(stabilisers=ModelStabilisers(logit_cap=1e5)))
    assert receipts["stabilisers.logit_cap"].startswith("idle: largest attention logit ")


def test_initial_weights_of_another_scheme_are_dead() -> None:
    module = module_of(stabilisers=ModelStabilisers(init_scale=0.01))
    for parameter in module.backbone.blocks.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    refused(module, "stabilisers.init_scale", "0.0088 with it, 0.088 without")


def test_a_projection_that_is_not_frozen_is_dead() -> None:
    module = module_of(stabilisers=ModelStabilisers(freeze_patches=True))
    module.backbone.patches.project.requires_grad_(True)
    refused(module, "stabilisers.freeze_patches", "2 tensors of the patch projection take gradients")


@pytest.mark.parametrize("with_images", [True, False])
def test_samples_without_a_word_show_nothing_and_end_nothing(with_images: bool) -> None:
    # attention over padding alone weighs all of it alike, with norms or without
    batch = pair_batch()
    assert batch.text_BL is not None
    empty = batch._replace(text_BL=0 * batch.text_BL, text_mask_BL=torch.zeros_like(batch.text_BL, dtype=torch.bool))
    empty = empty if with_images else empty._replace(images_BRYX=None)
    for switches in (ModelStabilisers(), ModelStabilisers(qk_norm=False, logit_cap=1.0)):
        seen = fit(module_of(stabilisers=switches), 1, batches=[empty], callbacks=[Liveness()])
        assert len(seen.outputs) == 1
        clipped = module_of(stabilisers=ModelStabilisers(qk_norm=False), actions=Actions(QKClip()))
        assert len(fit(clipped, 1, batches=[empty], callbacks=[Liveness()]).outputs) == 1
