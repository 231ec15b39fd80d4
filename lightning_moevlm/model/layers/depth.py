"""The depth of a block, and DeepNorm's weights that follow from it (DeepNet, arXiv 2203.00555, section 4.1)."""

from typing import NamedTuple


class Depth(NamedTuple):
    """The depth of a block: its index from 0, of num_blocks."""

    block: int
    num_blocks: int


def deepnorm_alpha(depth: Depth) -> float:
    """Return (2 N)^(1/4): the weight of the residual in a stack of N blocks without cross-attention."""
    return float((2 * depth.num_blocks) ** 0.25)


def deepnorm_beta(depth: Depth) -> float:
    """Return (8 N)^(-1/4): the factor on the initial values, outputs and feed-forwards of such a stack."""
    return float((8 * depth.num_blocks) ** -0.25)
