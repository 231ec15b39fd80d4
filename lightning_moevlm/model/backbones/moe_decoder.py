"""MoE decoder: vision tower, connector, causal language model (MoE-LLaVA, arXiv 2401.15947; CuMo, arXiv 2405.05949).

    image -> vision tower (every patch sees every other) -> connector -> tokens before the text
    language model:   every n-th block a mixture of experts for patches and words, the others dense

The tokens of the image are a prefix: they see each other, and text sees them and earlier text (PaliGemma, arXiv
2407.07726, section 3.2). LLaVA masks the image causally too.

Trained in stages (MoE-LLaVA, section 3.3): the connector alone; then the model while it is dense (`moe_every: null`);
then the experts, which start as copies of the dense feed-forwards. The options of the module for that are `trainable`
and `init_from`.
"""

from collections.abc import Callable

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones.backbone import BackboneSpec
from lightning_moevlm.model.backbones.placement import Placement, place_experts
from lightning_moevlm.model.backbones.trunk import Trunk
from lightning_moevlm.model.backbones.vision_tower import Connector, ConnectorOptions, VisionOptions, VisionTower
from lightning_moevlm.model.layers import DenseFFN, FeedForward, ModelStabilisers, MoEFFN, dense_twin


class MoEDecoder(Trunk):
    """MoE decoder backbone; the defaults are the shapes of MoE-LLaVA-2.7Bx4 (Phi-2).

    Args:
        dim: width D of the language model.
        num_heads: attention heads H.
        num_blocks: transformer blocks.
        hidden_dim: hidden width of dense feed-forwards.
        image_size: pixels, height and width.
        patch_size: pixels, height and width.
        vocab_size: V.
        max_text_len: longest text L.
        moe: factory (dim) -> MoEFFN for the sparse blocks of the language model.
        moe_every: every n-th block is sparse; MoE-LLaVA uses 2. null leaves all blocks dense with `hidden_dim`, the
            model that experts are upcycled from.
        moe_placement: which blocks are sparse in place of every n-th: all, first_half, second_half, or {last: n}.
        vision: shape of the vision tower.
        connector: feed-forward of the connector.
        is_gated: the dense feed-forwards of the language model are SwiGLU, as in Llama and Mistral; for `GatedExperts`.
        is_sparse: false is the dense twin: every mixture becomes a dense feed-forward of equal active FLOPs.
        stabilisers: switches of the trunk, in the vision tower too.
        patch_codebook: file of `moevlm data codebook` for routers that hash patches; null hashes random projections.

    Raises:
        UserError: dimensions that do not fit each other, no block for experts, or a router that looks ahead.
    """

    def __init__(
        self,
        dim: int = 2560,
        num_heads: int = 32,
        num_blocks: int = 32,
        hidden_dim: int = 10_240,
        image_size: int = 336,
        patch_size: int = 14,
        vocab_size: int = 51_200,
        max_text_len: int = 2048,
        moe: Callable[[int], MoEFFN] = MoEFFN,
        moe_every: int | None = 2,
        moe_placement: Placement = None,
        vision: VisionOptions = VisionOptions(),
        connector: ConnectorOptions = ConnectorOptions(),
        is_gated: bool = False,
        is_sparse: bool = True,
        stabilisers: ModelStabilisers = ModelStabilisers(),
        patch_codebook: str | None = None,
    ) -> None:
        check_number("num_blocks", num_blocks, least=1)
        check_number("vision.num_blocks", vision.num_blocks, least=1)

        def place(count: int, every: int | None, placement: Placement) -> frozenset[int]:
            if every is None and placement is None:
                return frozenset()
            return place_experts(count, 1 if every is None else every, placement, is_dense=not is_sparse)

        sparse = place(num_blocks, moe_every, moe_placement)
        seeing = place(vision.num_blocks, None if vision.moe is None else vision.moe_every, None)
        spec = BackboneSpec(dim, image_size, patch_size, vocab_size, max_text_len)
        patches = {Modality.IMAGE: spec.num_patches}

        def mixture(layer: MoEFFN, length: dict[Modality, int]) -> FeedForward:
            return layer if is_sparse else dense_twin(layer, layer.dim, length)

        def of_vision(block: int) -> FeedForward:
            if vision.moe is None or block not in seeing:
                return DenseFFN(vision.dim, vision.hidden_dim)
            return mixture(vision.moe(vision.dim), patches)

        def of_language(block: int) -> FeedForward:
            if block not in sparse:
                return DenseFFN(dim, hidden_dim, is_gated)
            return mixture(moe(dim), patches | {Modality.TEXT: max_text_len})

        between = DenseFFN(dim, connector.hidden_dim) if connector.moe is None else mixture(connector.moe(dim), patches)
        super().__init__(
            spec,
            num_heads,
            num_blocks,
            of_language,
            stabilisers,
            causal=True,
            patch_codebook=patch_codebook,
            vision=VisionTower(vision, image_size, patch_size, of_vision, stabilisers),
            connector=Connector(vision.dim, spec.num_patches, dim, between),
        )
