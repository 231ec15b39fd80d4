"""LIMoE: one tower and one mixture of experts for images and texts (arXiv 2206.02770, sections 2.1 and 3.1).

    sparse blocks:      shared self-attention, then one MoE whose router sees patches and words alike
    the other blocks:   shared self-attention, then a shared dense feed-forward

The opposite of VL-MoE: no hard split by modality, so whether experts specialise is left to training. Balance over the
pooled tokens hides the collapse of the rarer modality; the entropy losses per modality are the paper's remedy.
"""

from collections.abc import Callable

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones.backbone import BackboneSpec
from lightning_moevlm.model.backbones.placement import Placement, place_experts
from lightning_moevlm.model.backbones.trunk import Trunk
from lightning_moevlm.model.layers import DenseFFN, FeedForward, ModelStabilisers, MoEFFN, dense_twin


class LIMoE(Trunk):
    """LIMoE backbone.

    Args:
        dim: model width D.
        num_heads: attention heads H.
        num_blocks: transformer blocks.
        hidden_dim: hidden width of dense feed-forwards.
        image_size: pixels, height and width.
        patch_size: pixels, height and width.
        vocab_size: V.
        max_text_len: longest text L.
        moe: factory (dim) -> MoEFFN for the sparse blocks; top-1 by default, as in the paper.
        moe_every: every n-th block is sparse; the paper uses 2.
        moe_placement: which blocks are sparse in place of every n-th: all, first_half, second_half, or {last: n}.
        is_sparse: false is the dense twin: sparse blocks get a dense feed-forward of equal active FLOPs.
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
        hidden_dim: int = 3072,
        image_size: int = 224,
        patch_size: int = 16,
        vocab_size: int = 64_000,
        max_text_len: int = 40,
        moe: Callable[[int], MoEFFN] = MoEFFN,
        moe_every: int = 2,
        moe_placement: Placement = None,
        is_sparse: bool = True,
        stabilisers: ModelStabilisers = ModelStabilisers(),
        causal: bool = False,
        patch_codebook: str | None = None,
    ) -> None:
        check_number("num_blocks", num_blocks, least=1)
        sparse_blocks = place_experts(num_blocks, moe_every, moe_placement, is_dense=not is_sparse)
        spec = BackboneSpec(dim, image_size, patch_size, vocab_size, max_text_len)
        length = {Modality.IMAGE: spec.num_patches, Modality.TEXT: max_text_len}

        def feed_forward(block: int) -> FeedForward:
            if block not in sparse_blocks:
                return DenseFFN(dim, hidden_dim)
            return moe(dim) if is_sparse else dense_twin(moe(dim), dim, length)

        super().__init__(spec, num_heads, num_blocks, feed_forward, stabilisers, causal, patch_codebook)
