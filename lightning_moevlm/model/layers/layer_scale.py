"""Layer scale: a learned factor per channel on the output of a branch (CaiT, arXiv 2103.17239, section 2).

    x + g * f(x),   g starts at a small constant

Small starts keep deep stacks near the identity; 0 makes every block the identity at first, which let the authors of
StableAdamW train in fp8 (arXiv 2304.13013, section 2).
"""

import torch
from torch import Tensor, nn

from lightning_moevlm.model.initial_weights import Module


class LayerScale(Module):
    """Multiplies each channel by a learned factor.

    Args:
        dim: model width D.
        initial_value: of every factor; `initialise` reads it.
    """

    def __init__(self, dim: int, initial_value: float) -> None:
        super().__init__()
        self.initial_value = initial_value
        self.scale_D = nn.Parameter(torch.empty(dim))

    def forward(self, tokens_BSD: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        return tokens_BSD * self.scale_D
