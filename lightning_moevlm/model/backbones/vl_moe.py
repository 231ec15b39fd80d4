"""VL-MoE: a multiway transformer with a mixture of experts per modality (arXiv 2303.07226, sections 3.1 and 3.2).

    block below the top F:  shared self-attention, then image and text feed-forwards of their own; in every second
                            block each of the two is a MoE with its own router
    top F blocks:           shared self-attention, then a vision-language feed-forward for pairs; inputs of a single
                            modality keep their own

Image-only, text-only and pair inputs run through the same attention weights on their own paths. The split by modality
is hard; learning to route happens inside a modality.
"""

from collections.abc import Callable
from typing import Literal

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones.backbone import BackboneSpec
from lightning_moevlm.model.backbones.placement import Placement, place_experts
from lightning_moevlm.model.backbones.trunk import Trunk
from lightning_moevlm.model.layers import DenseFFN, FeedForward, ModelStabilisers, MoEFFN, MultiwayFFN, dense_twin


class VLMoE(Trunk):
    """VL-MoE backbone.

    Args:
        dim: model width D.
        num_heads: attention heads H.
        num_blocks: transformer blocks.
        num_vl_blocks: F, blocks on top whose feed-forward the tokens of a pair share (paper: 2 at BASE, 3 at LARGE).
        hidden_dim: hidden width of dense feed-forwards.
        image_size: pixels, height and width.
        patch_size: pixels, height and width.
        vocab_size: V.
        max_text_len: longest text L.
        moe: factory (dim) -> MoEFFN for the sparse blocks.
        moe_every: every n-th block below the top F is sparse; the paper uses 2.
        moe_placement: which blocks below the top F are sparse in place of every n-th: all, first_half, second_half, or
            {last: n}.
        sparse_modalities: modalities with experts; the others get the dense twin of equal active FLOPs in those blocks,
            so [] is the dense twin of the whole model.
        sparse_top: the top F may be sparse too; only the feed-forwards of single modalities become sparse
            there, the one for pairs stays dense. BASE with 32 experts then has 1.96 B parameters, as published (about
            2.0 B); without, 1.66 B.
        stabilisers: switches that keep training stable.
        causal: text sees patches and earlier text alone, and patches see patches.
        patch_codebook: file of `moevlm data codebook` for routers that hash patches; null hashes random projections.

    Raises:
        UserError: dimensions that do not fit each other, no sparse block, or a causal model that looks ahead.
    """

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 12,
        num_blocks: int = 12,
        num_vl_blocks: int = 2,
        hidden_dim: int = 3072,
        image_size: int = 224,
        patch_size: int = 16,
        vocab_size: int = 64_000,
        max_text_len: int = 40,
        moe: Callable[[int], MoEFFN] = MoEFFN,
        moe_every: int = 2,
        moe_placement: Placement = None,
        sparse_modalities: tuple[Literal["image", "text"], ...] = ("image", "text"),
        sparse_top: bool = False,
        stabilisers: ModelStabilisers = ModelStabilisers(),
        causal: bool = False,
        patch_codebook: str | None = None,
    ) -> None:
        check_number("num_blocks", num_blocks, least=1)
        if not 0 <= num_vl_blocks <= num_blocks:
            raise UserError(f"num_vl_blocks is {num_vl_blocks}: choose between 0 and num_blocks {num_blocks}")
        may_be_sparse = num_blocks if sparse_top else num_blocks - num_vl_blocks
        if not may_be_sparse and sparse_modalities:
            raise UserError(
                "num_vl_blocks equals num_blocks, which leaves no block for experts: lower it, or set "
                "sparse_modalities to [] for a dense model"
            )
        sparse_blocks = place_experts(may_be_sparse, moe_every, moe_placement, is_dense=not sparse_modalities)
        if len(set(sparse_modalities)) < len(sparse_modalities):
            raise UserError(f"sparse_modalities is {list(sparse_modalities)}: name each modality once")
        spec = BackboneSpec(dim, image_size, patch_size, vocab_size, max_text_len)
        length = {Modality.IMAGE: spec.num_patches, Modality.TEXT: max_text_len}

        def single(modality: Modality, is_sparse: bool) -> FeedForward:
            if not is_sparse:
                return DenseFFN(dim, hidden_dim)
            experts = moe(dim)
            if modality.label in sparse_modalities:
                return experts
            return dense_twin(experts, dim, {modality: length[modality]})

        def feed_forward(block: int) -> FeedForward:
            is_top = block >= num_blocks - num_vl_blocks
            is_sparse = block in sparse_blocks
            pair = DenseFFN(dim, hidden_dim) if is_top else None
            return MultiwayFFN(single(Modality.IMAGE, is_sparse), single(Modality.TEXT, is_sparse), pair)

        super().__init__(spec, num_heads, num_blocks, feed_forward, stabilisers, causal, patch_codebook)
