"""MoMa: one early-fusion transformer whose experts are grouped by modality (arXiv 2407.21770, sections 2.2 and 4.1).

    sparse blocks (all):  shared self-attention, then a group of experts for patches and one for words, each with a
                          router of its own
    mixed:                shared self-attention, then one group for both: the paper's comparison "8x"

A token stays with the experts of its modality; learning to route happens inside a group, by token choice or, as in the
paper, by expert choice with sigmoid scores. Unlike VL-MoE no feed-forward is shared by pairs. Dense is one feed-forward
for both modalities, as in Chameleon (arXiv 2405.09818). Mixture-of-depths (section 2.3) is left out.
"""

from collections.abc import Callable

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones.backbone import BackboneSpec
from lightning_moevlm.model.backbones.placement import Placement, place_experts
from lightning_moevlm.model.backbones.trunk import Trunk
from lightning_moevlm.model.layers import DenseFFN, FeedForward, ModelStabilisers, MoEFFN, MultiwayFFN, dense_twin


class MoMa(Trunk):
    """MoMa backbone.

    Args:
        dim: model width D.
        num_heads: attention heads H.
        num_blocks: transformer blocks.
        hidden_dim: hidden width of dense feed-forwards, in blocks without experts.
        image_size: pixels, height and width.
        patch_size: pixels, height and width.
        vocab_size: V.
        max_text_len: longest text L.
        moe: factory (dim) -> MoEFFN of a group of experts.
        text_moe: factory of the text group where it differs from the image group; null takes `moe` for both.
        is_grouped: false is one mixture for the tokens of both modalities.
        moe_every: every n-th block is sparse; the paper uses 1.
        moe_placement: which blocks are sparse in place of every n-th: all, first_half, second_half, or {last: n}.
        is_sparse: false is the dense twin: sparse blocks get one dense feed-forward of equal active FLOPs.
        stabilisers: switches that keep training stable.
        causal: text sees patches and earlier text alone, and patches see patches.
        patch_codebook: file of `moevlm data codebook` for routers that hash patches; null hashes random projections.

    Raises:
        UserError: dimensions that do not fit each other, no sparse block, a text group that is not used, or a causal
            model that looks ahead.
    """

    def __init__(
        self,
        dim: int = 1024,
        num_heads: int = 16,
        num_blocks: int = 24,
        hidden_dim: int = 4096,
        image_size: int = 512,
        patch_size: int = 16,
        vocab_size: int = 65_536,
        max_text_len: int = 128,
        moe: Callable[[int], MoEFFN] = MoEFFN,
        text_moe: Callable[[int], MoEFFN] | None = None,
        is_grouped: bool = True,
        moe_every: int = 1,
        moe_placement: Placement = None,
        is_sparse: bool = True,
        stabilisers: ModelStabilisers = ModelStabilisers(),
        causal: bool = False,
        patch_codebook: str | None = None,
    ) -> None:
        check_number("num_blocks", num_blocks, least=1)
        if text_moe is not None and not is_grouped:
            raise UserError(
                "text_moe describes the text experts of a grouped MoMa, and is_grouped is false: set text_moe to null, "
                "or is_grouped to true"
            )
        sparse_blocks = place_experts(num_blocks, moe_every, moe_placement, is_dense=not is_sparse)
        spec = BackboneSpec(dim, image_size, patch_size, vocab_size, max_text_len)
        length = {Modality.IMAGE: spec.num_patches, Modality.TEXT: max_text_len}

        def feed_forward(block: int) -> FeedForward:
            if block not in sparse_blocks:
                return DenseFFN(dim, hidden_dim)
            experts = MultiwayFFN(moe(dim), (text_moe or moe)(dim)) if is_grouped else moe(dim)
            return experts if is_sparse else dense_twin(experts, dim, length)

        super().__init__(spec, num_heads, num_blocks, feed_forward, stabilisers, causal, patch_codebook)
