"""The shared trunk of the backbones: embed, concatenate the modalities, run the blocks, normalise.

Backbones differ in the feed-forwards of their blocks, which they pass to the constructor.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.contracts.step_records import AttentionLogits, NamedPlan
from lightning_moevlm.model.backbones.backbone import Backbone, BackboneOutput, BackboneSpec
from lightning_moevlm.model.backbones.past import Past
from lightning_moevlm.model.layers import (
    HIDDEN,
    Attention,
    Block,
    Depth,
    FeedForward,
    KeyValues,
    ModelStabilisers,
    PatchCodes,
    PatchEmbedding,
    TextEmbedding,
    check_causal,
    make_norm,
    name_layers,
    normalise,
    reads_identity,
)
from lightning_moevlm.model.precision import region


class Trunk(Backbone):
    """A pre-embedded sequence of patches and words through transformer blocks.

    Args:
        spec: dimensions.
        num_heads: attention heads H.
        num_blocks: transformer blocks.
        feed_forward: index of a block -> its feed-forward.
        stabilisers: switches of the trunk.
        causal: text sees patches and earlier text alone, and patches see patches.
        patch_codebook: file of `moevlm data codebook` for routers that hash patches; null hashes random projections.

    Raises:
        UserError: dimensions that do not fit each other, or a causal model with a part that looks ahead.
    """

    @abstractmethod
    def __init__(
        self,
        spec: BackboneSpec,
        num_heads: int,
        num_blocks: int,
        feed_forward: Callable[[int], FeedForward],
        stabilisers: ModelStabilisers,
        causal: bool,
        patch_codebook: str | None,
    ) -> None:
        super().__init__()
        check_number("num_blocks", num_blocks, least=1)
        self.spec = spec
        self.patches = PatchEmbedding(spec.dim, spec.image_size, spec.patch_size, stabilisers.freeze_patches)
        self.text = TextEmbedding(spec.dim, spec.vocab_size, spec.max_text_len)

        def block(index: int) -> Block:
            ffn = feed_forward(index)
            if stabilisers.sub_norm:
                ffn.add_hidden_norm(stabilisers.norm)
            attention = Attention(spec.dim, num_heads, stabilisers)
            return Block(spec.dim, attention, ffn, stabilisers, Depth(index, num_blocks))

        self.blocks = nn.ModuleList(block(index) for index in range(num_blocks))
        self.norm = make_norm(stabilisers.norm, spec.dim)
        self.causal = causal
        self.patch_codes = PatchCodes(spec.patch_size, codebook=patch_codebook) if reads_identity(self) else None
        name_layers(self)
        if causal:
            check_causal(self)

    @property
    def text_embedding_VD(self) -> Tensor:
        """Token embedding matrix."""
        return self.text.token.weight

    def forward(
        self,
        images_BRYX: Tensor | None = None,
        text_BL: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
        image_mask_BP: Tensor | None = None,
        separate: bool = False,
        causal: bool = False,
    ) -> BackboneOutput:
        """Encode images, texts or pairs; at least one of the two must be given."""
        return self._encode(images_BRYX, text_BL, text_mask_BL, image_mask_BP, separate, causal, None)

    def prefill(self, images_BRYX: Tensor | None, text_BL: Tensor, text_mask_BL: Tensor) -> tuple[BackboneOutput, Past]:
        """Encode the beginning of texts that are to be continued, and what their next positions need of it."""
        past = Past([KeyValues() for _ in self.blocks])
        output = self._encode(images_BRYX, text_BL, text_mask_BL, None, False, True, past.key_values)
        past.layout, past.length_B = output.layout, text_mask_BL.sum(dim=1)
        return output, past

    def extend(self, text_B: Tensor, past: Past) -> Tensor:
        """Return the features of one more token of each text, (B, D); `past` is extended."""
        assert past.layout is not None and past.length_B is not None
        with region(self.precision, "trunk", text_B.device.type):
            # texts that have ended are carried along with the others, at the last position
            position_B1 = past.length_B.clamp(max=self.spec.max_text_len - 1).unsqueeze(1)
            tokens_B1D = self.text(text_B.unsqueeze(1), position_B1)
        past.append(text_B)
        for block, key_values in zip(self.blocks, past.key_values, strict=True):
            tokens_B1D = block(tokens_B1D, past.layout, past=key_values).tokens_BSD
        return normalise(tokens_B1D, self.norm, self.precision).squeeze(1)

    def _encode(
        self,
        images_BRYX: Tensor | None,
        text_BL: Tensor | None,
        text_mask_BL: Tensor | None,
        image_mask_BP: Tensor | None,
        separate: bool,
        causal: bool,
        past: list[KeyValues] | None,
    ) -> BackboneOutput:
        tokens_BSD, layout, source = self._embed(
            images_BRYX, text_BL, text_mask_BL, image_mask_BP, separate, self.causal or causal
        )
        plans: list[NamedPlan] = []
        attention: list[AttentionLogits] = []
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            tokens_BSD, routed, logit_max_H = block(
                tokens_BSD, layout, self.measure_attention, None if past is None else past[index]
            )
            plans.extend(NamedPlan(source, index, *plan) for plan in routed)
            if logit_max_H is not None:
                attention.append(AttentionLogits(source, index, block.attention.path, logit_max_H))
        tokens_BSD = normalise(tokens_BSD, self.norm, self.precision)
        return BackboneOutput(tokens_BSD, layout, tuple(plans), tuple(attention))

    def forward_flops(self, num_tokens: Mapping[Modality, int]) -> float:
        """Active matrix FLOPs of one forward pass of one sample."""
        embedding = self.patches.forward_flops() if num_tokens.get(Modality.IMAGE) else 0.0
        return embedding + sum(block.forward_flops(num_tokens) for block in self.blocks if isinstance(block, Block))

    def _embed(
        self,
        images_BRYX: Tensor | None,
        text_BL: Tensor | None,
        text_mask_BL: Tensor | None,
        image_mask_BP: Tensor | None,
        separate: bool,
        causal: bool,
    ) -> "_Sequence":
        """Embed, patches first."""
        pieces: list[Tensor] = []
        valid: list[Tensor] = []
        spans: list[Span] = []
        identity: list[Tensor] = []
        if images_BRYX is not None:
            with region(self.precision, "trunk", images_BRYX.device.type):
                patches_BPD = self.patches(images_BRYX, image_mask_BP)
            spans.append(Span(Modality.IMAGE, 0, patches_BPD.shape[1]))
            pieces.append(patches_BPD)
            valid.append(torch.ones(patches_BPD.shape[:2], dtype=torch.bool, device=patches_BPD.device))
            if self.patch_codes is not None:
                # codes start at HIDDEN, which must not be the last token's id
                identity.append(self.spec.vocab_size - HIDDEN + self.patch_codes(images_BRYX, image_mask_BP))
        if text_BL is not None:
            assert text_mask_BL is not None, "text comes with its mask"
            start = spans[-1].stop if spans else 0
            spans.append(Span(Modality.TEXT, start, start + text_BL.shape[1]))
            with region(self.precision, "trunk", text_BL.device.type):
                pieces.append(self.text(text_BL))
            valid.append(text_mask_BL)
            if self.patch_codes is not None:
                identity.append(text_BL)
        assert spans, "a forward pass needs images, text or both"
        source = "pair" if len(spans) > 1 else spans[0].modality.label
        identity_BS = torch.cat(identity, dim=1) if identity else None
        layout = Layout(tuple(spans), torch.cat(valid, dim=1), identity_BS, causal, separate)
        return _Sequence(torch.cat(pieces, dim=1), layout, source)


class _Sequence(NamedTuple):
    """tokens_BSD: embedded. layout: where the modalities lie. source: "image", "text" or "pair"."""

    tokens_BSD: Tensor
    layout: Layout
    source: str
