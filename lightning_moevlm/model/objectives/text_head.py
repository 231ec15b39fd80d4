"""Turns features into logits over the vocabulary by the backbone's own embedding (BERT, arXiv 1810.04805, 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextHead(nn.Sequential):
    """Linear, GELU, norm, then the transposed embedding and a bias.

    Args:
        dim: model width D.
        vocab_size: V.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        self.bias_V = nn.Parameter(torch.empty(vocab_size))

    def logits(self, features_MD: Tensor, embedding_VD: Tensor) -> Tensor:
        """Return (M, V)."""
        return F.linear(self(features_MD), embedding_VD, self.bias_V)
