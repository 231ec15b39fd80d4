"""Feed-forwards (dense, MoE, multiway), attention, block: what models are arranged from."""

from lightning_moevlm.layers.attention import Attention
from lightning_moevlm.layers.block import Block
from lightning_moevlm.layers.dense import DenseFFN, dense_twin
from lightning_moevlm.layers.embeddings import PatchEmbedding, TextEmbedding
from lightning_moevlm.layers.feed_forward import FeedForward, FFNOutput, RoutedPlan
from lightning_moevlm.layers.initialise import initialise
from lightning_moevlm.layers.moe import MoEFFN, name_layers, reads_identity
from lightning_moevlm.layers.multiway import MultiwayFFN
from lightning_moevlm.layers.normalise import normalised
from lightning_moevlm.layers.patch_codes import PatchCodes

__all__ = [
    "Attention",
    "Block",
    "DenseFFN",
    "FFNOutput",
    "FeedForward",
    "MoEFFN",
    "MultiwayFFN",
    "PatchCodes",
    "PatchEmbedding",
    "RoutedPlan",
    "TextEmbedding",
    "dense_twin",
    "initialise",
    "name_layers",
    "normalised",
    "reads_identity",
]
