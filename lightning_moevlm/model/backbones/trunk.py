"""The shared trunk of the backbones: embed, concatenate the modalities, run the blocks, normalise.

Backbones differ in the feed-forwards of their blocks, which they pass to the constructor, and in what an image passes
before it meets the text: a patch embedding, or a vision tower with a connector.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from lightning_moevlm.contracts.model_card import Costs, add_costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.model.backbones.backbone import Backbone, BackboneOutput, BackboneSpec
from lightning_moevlm.model.backbones.past import Past
from lightning_moevlm.model.backbones.vision_tower import Connector, VisionTower
from lightning_moevlm.model.layers import (
    HIDDEN,
    Block,
    FeedForward,
    KeyValues,
    ModelStabilisers,
    PatchCodes,
    PatchEmbedding,
    StackOutput,
    TextEmbedding,
    bound_gates,
    check_causal,
    count_parameters,
    idle_in_blocks,
    make_norm,
    name_layers,
    normalise,
    reads_identity,
    run_blocks,
    stack_blocks,
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
        vision: encodes images before they meet the text; null embeds their patches alone.
        connector: brings the vision tower's tokens to the trunk's width; given with it.

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
        vision: VisionTower | None = None,
        connector: Connector | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.patches = None
        if vision is None:
            self.patches = PatchEmbedding(spec.dim, spec.image_size, spec.patch_size, stabilisers.freeze_patches)
        self.vision, self.connector = vision, connector
        self.text = TextEmbedding(spec.dim, spec.vocab_size, spec.max_text_len)
        self.blocks = stack_blocks(spec.dim, num_heads, num_blocks, feed_forward, stabilisers)
        self.norm = make_norm(stabilisers.norm, spec.dim)
        self.causal = causal
        self.patch_codes = PatchCodes(spec.patch_size, codebook=patch_codebook) if reads_identity(self) else None
        name_layers(self)
        bound_gates(self, stabilisers.glu)
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
        tokens_B1D = run_blocks(self.blocks, tokens_B1D, past.layout, "text", past=past.key_values).tokens_BSD
        return normalise(tokens_B1D, self.norm, self.precision).squeeze(1)

    def _encode(
        self,
        images_BRYX: Tensor | None,
        text_BL: Tensor | None,
        text_mask_BL: Tensor | None,
        image_mask_BP: Tensor | None,
        separate: bool,
        causal: bool,
        past: Sequence[KeyValues] | None,
    ) -> BackboneOutput:
        assert images_BRYX is not None or text_BL is not None, "a forward pass needs images, text or both"
        source = (
            "pair" if images_BRYX is not None and text_BL is not None else "text" if images_BRYX is None else "image"
        )
        pieces: list[Tensor] = []
        valid: list[Tensor] = []
        spans: list[Span] = []
        identity: list[Tensor] = []
        seen = None
        if images_BRYX is not None:
            if self.patch_codes is not None:
                # codes start at HIDDEN, which must not be the last token's id
                identity.append(self.spec.vocab_size - HIDDEN + self.patch_codes(images_BRYX, image_mask_BP))
            seen = self._see(images_BRYX, image_mask_BP, identity[0] if identity else None, source)
            spans.append(Span(Modality.IMAGE, 0, seen.tokens_BSD.shape[1]))
            pieces.append(seen.tokens_BSD)
            valid.append(torch.ones(seen.tokens_BSD.shape[:2], dtype=torch.bool, device=seen.tokens_BSD.device))
        if text_BL is not None:
            assert text_mask_BL is not None, "text comes with its mask"
            start = spans[-1].stop if spans else 0
            spans.append(Span(Modality.TEXT, start, start + text_BL.shape[1]))
            with region(self.precision, "trunk", text_BL.device.type):
                pieces.append(self.text(text_BL))
            valid.append(text_mask_BL)
            if self.patch_codes is not None:
                identity.append(text_BL)
        identity_BS = torch.cat(identity, dim=1) if identity else None
        layout = Layout(tuple(spans), torch.cat(valid, dim=1), identity_BS, self.causal or causal, separate)
        first = 0 if self.vision is None else self.vision.num_layers
        output = run_blocks(self.blocks, torch.cat(pieces, dim=1), layout, source, first, self.measure_attention, past)
        tokens_BSD = normalise(output.tokens_BSD, self.norm, self.precision)
        before = StackOutput(tokens_BSD) if seen is None else seen
        return BackboneOutput(tokens_BSD, layout, before.plans + output.plans, before.attention + output.attention)

    def costs(self, num_tokens: Mapping[Modality, int], separate: bool = False) -> Costs:
        """Sum over what embeds images, the blocks and the last norm."""
        seeing: list[Costs] = []
        if num_tokens.get(Modality.IMAGE):
            parts = (self.patches, self.vision, self.connector)
            seeing = [part.costs() for part in parts if part is not None]
            if self.patch_codes is not None:
                seeing.append(self.patch_codes.costs(self.spec.num_patches))
        blocks = [block.costs(num_tokens, separate) for block in self.blocks if isinstance(block, Block)]
        norm = Costs(kept_by_norms=float(sum(num_tokens.values()) * self.spec.dim))
        return add_costs([*seeing, *blocks, norm])

    def active_parameters(self, modalities: Collection[Modality], separate: bool = False) -> float:
        """All but what embeds the other modality and what feed-forwards leave out."""
        active = count_parameters(self) - idle_in_blocks(self.blocks, modalities, separate)
        if Modality.TEXT not in modalities:
            active -= count_parameters(self.text)
        for part in (self.patches, self.vision, self.connector):
            if part is not None:
                active -= part.idle_parameters() if Modality.IMAGE in modalities else count_parameters(part)
        return active

    def num_plans(self, modalities: Collection[Modality]) -> int:
        """Return how many plans `forward` makes of sequences of these modalities; text alone passes no vision tower."""
        own = sum(block.ffn.num_plans(modalities) for block in self.blocks if isinstance(block, Block))
        if self.vision is None or self.connector is None or Modality.IMAGE not in modalities:
            return own
        return own + self.vision.num_plans() + self.connector.num_plans()

    def _see(
        self, images_BRYX: Tensor, image_mask_BP: Tensor | None, identity_BP: Tensor | None, source: str
    ) -> StackOutput:
        """Turn images into tokens of the trunk's width."""
        if self.patches is not None:
            with region(self.precision, "trunk", images_BRYX.device.type):
                return StackOutput(self.patches(images_BRYX, image_mask_BP))
        assert self.vision is not None and self.connector is not None
        seen: StackOutput = self.vision(images_BRYX, image_mask_BP, identity_BP, source, self.measure_attention)
        joined: StackOutput = self.connector(seen.tokens_BSD, identity_BP, source, self.vision.num_layers - 1)
        return joined._replace(plans=seen.plans + joined.plans, attention=seen.attention)
