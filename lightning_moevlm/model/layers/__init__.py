"""Feed-forwards (dense, MoE, multiway), attention, block: what models are arranged from."""

from lightning_moevlm.model.initial_weights import defer_initialisation, initialise
from lightning_moevlm.model.layers.attention import Attention, AttentionOutput, KeyValues, joined_matrices
from lightning_moevlm.model.layers.batch_dependence import batch_dependence, find_evaluation_limits
from lightning_moevlm.model.layers.block import (
    Block,
    BlockOutput,
    StackOutput,
    idle_in_blocks,
    run_blocks,
    stack_blocks,
)
from lightning_moevlm.model.layers.causality import check_causal
from lightning_moevlm.model.layers.depth import Depth
from lightning_moevlm.model.layers.embeddings import PatchEmbedding, TextEmbedding
from lightning_moevlm.model.layers.feed_forward.bound_gates import bound_gates, gated_parts
from lightning_moevlm.model.layers.feed_forward.dense import DenseFFN, dense_twin
from lightning_moevlm.model.layers.feed_forward.feed_forward import (
    FeedForward,
    FFNOutput,
    RoutedPlan,
    count_parameters,
)
from lightning_moevlm.model.layers.feed_forward.mixture import Mixture
from lightning_moevlm.model.layers.feed_forward.moe import MoEFFN, name_layers, reads_identity
from lightning_moevlm.model.layers.feed_forward.multiway import MultiwayFFN
from lightning_moevlm.model.layers.norms import make_norm, normalise
from lightning_moevlm.model.layers.patch_codes import HIDDEN, PatchCodes
from lightning_moevlm.model.layers.stabilisers import ModelStabilisers

__all__ = [
    "HIDDEN",
    "Attention",
    "AttentionOutput",
    "Block",
    "BlockOutput",
    "DenseFFN",
    "Depth",
    "FFNOutput",
    "FeedForward",
    "KeyValues",
    "Mixture",
    "MoEFFN",
    "ModelStabilisers",
    "MultiwayFFN",
    "PatchCodes",
    "PatchEmbedding",
    "RoutedPlan",
    "StackOutput",
    "TextEmbedding",
    "batch_dependence",
    "bound_gates",
    "check_causal",
    "count_parameters",
    "defer_initialisation",
    "dense_twin",
    "find_evaluation_limits",
    "gated_parts",
    "idle_in_blocks",
    "initialise",
    "joined_matrices",
    "make_norm",
    "name_layers",
    "normalise",
    "reads_identity",
    "run_blocks",
    "stack_blocks",
]
