"""What every backbone does: embed, lay the modalities in a row, run the blocks, normalise.

Backbones hold the parts and call these functions; they differ in the feed-forwards of their blocks.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_moevlm.errors import UserError
from lightning_moevlm.layers import (
    HIDDEN,
    Attention,
    Block,
    Depth,
    FeedForward,
    ModelStabilisers,
    PatchCodes,
    PatchEmbedding,
    TextEmbedding,
    normalised,
)
from lightning_moevlm.models.backbone import BackboneOutput, BackboneSpec
from lightning_moevlm.plans import Modality
from lightning_moevlm.precision import PrecisionPolicy, region
from lightning_moevlm.records import AttentionLogits, Layout, NamedPlan, Span


class Sequence(NamedTuple):
    """tokens_BSD: embedded. layout: where the modalities lie. source: "image", "text" or "pair"."""

    tokens_BSD: Tensor
    layout: Layout
    source: str


def build_blocks(
    dim: int,
    num_heads: int,
    num_blocks: int,
    feed_forward: Callable[[int], FeedForward],
    stabilisers: ModelStabilisers,
) -> nn.ModuleList:
    """Return the blocks; feed_forward: index of the block -> its feed-forward."""

    def block(index: int) -> Block:
        ffn = feed_forward(index)
        if stabilisers.sub_norm:
            ffn.add_hidden_norm(stabilisers.norm)
        return Block(dim, Attention(dim, num_heads, stabilisers), ffn, stabilisers, Depth(index, num_blocks))

    return nn.ModuleList(block(index) for index in range(num_blocks))


def check_moe_every(moe_every: int) -> None:
    """Refuse a spacing of sparse blocks that is none.

    Raises:
        UserError: moe_every below 1.
    """
    if moe_every < 1:
        raise UserError(f"moe_every is {moe_every}: choose 1 (every block) or more")


class Embedder(Protocol):
    """The parts of a backbone that make a sequence of its inputs.

    patch_codes: gives patches an identity, or None where no router asks for one.
    """

    spec: BackboneSpec
    patches: PatchEmbedding
    text: TextEmbedding
    patch_codes: PatchCodes | None
    causal: bool
    precision: PrecisionPolicy


def embed(
    parts: Embedder,
    images_BRYX: Tensor | None,
    text_BL: Tensor | None,
    text_mask_BL: Tensor | None,
    image_mask_BP: Tensor | None,
) -> Sequence:
    """Embed images, texts or pairs, patches first; at least one of the two must be given."""
    pieces: list[Tensor] = []
    valid: list[Tensor] = []
    spans: list[Span] = []
    identity: list[Tensor] = []
    if images_BRYX is not None:
        with region(parts.precision, "trunk", images_BRYX.device.type):
            patches_BPD = parts.patches(images_BRYX, image_mask_BP)
        spans.append(Span(Modality.IMAGE, 0, patches_BPD.shape[1]))
        pieces.append(patches_BPD)
        valid.append(torch.ones(patches_BPD.shape[:2], dtype=torch.bool, device=patches_BPD.device))
        if parts.patch_codes is not None:
            # codes start at HIDDEN, which must not be the last token's id
            identity.append(parts.spec.vocab_size - HIDDEN + parts.patch_codes(images_BRYX, image_mask_BP))
    if text_BL is not None:
        assert text_mask_BL is not None, "text comes with its mask"
        start = spans[-1].stop if spans else 0
        spans.append(Span(Modality.TEXT, start, start + text_BL.shape[1]))
        with region(parts.precision, "trunk", text_BL.device.type):
            pieces.append(parts.text(text_BL))
        valid.append(text_mask_BL)
        if parts.patch_codes is not None:
            identity.append(text_BL)
    assert spans, "a forward pass needs images, text or both"
    source = "pair" if len(spans) > 1 else spans[0].modality.label
    identity_BS = torch.cat(identity, dim=1) if identity else None
    layout = Layout(tuple(spans), torch.cat(valid, dim=1), identity_BS, parts.causal)
    return Sequence(torch.cat(pieces, dim=1), layout, source)


def run_blocks(
    blocks: Iterable[nn.Module], norm: nn.Module, sequence: Sequence, precision: PrecisionPolicy, measure: bool
) -> BackboneOutput:
    """Run the blocks and the last norm; `measure` asks for the largest attention logits."""
    tokens_BSD, layout, source = sequence
    plans: list[NamedPlan] = []
    attention: list[AttentionLogits] = []
    for index, block in enumerate(blocks):
        tokens_BSD, routed, logit_max_H = block(tokens_BSD, layout, measure)
        plans.extend(NamedPlan(source, index, *plan) for plan in routed)
        if logit_max_H is not None:
            assert isinstance(block, Block)
            attention.append(AttentionLogits(source, index, block.attention.path, logit_max_H))
    return BackboneOutput(normalised(tokens_BSD, norm, precision), layout, tuple(plans), tuple(attention))


def trunk_flops(patches: PatchEmbedding, blocks: Iterable[nn.Module], num_tokens: Mapping[Modality, int]) -> float:
    """Return the active matrix FLOPs of one forward pass of one sample."""
    embedding = patches.forward_flops() if num_tokens.get(Modality.IMAGE) else 0.0
    return embedding + sum(block.forward_flops(num_tokens) for block in blocks if isinstance(block, Block))
