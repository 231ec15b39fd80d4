"""Turns features into logits over the vocabulary by the backbone's own embedding (BERT, arXiv 1810.04805, 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.contracts.model_card import Costs


class TextHead(nn.Sequential):
    """Linear, GELU, norm, then the transposed embedding and a bias.

    Args:
        dim: model width D.
        vocab_size: V.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        self.out_features = dim
        self.bias_V = nn.Parameter(torch.empty(vocab_size))

    def logits(self, features_MD: Tensor, embedding_VD: Tensor) -> Tensor:
        """Return (M, V)."""
        return F.linear(self(features_MD), embedding_VD, self.bias_V)

    def costs(self, num_predictions: int) -> Costs:
        """2 D^2 + 2 D V FLOPs each; logits and their log-probabilities are kept."""
        vocab_size, dim = self.bias_V.shape[0], self.out_features
        return Costs(
            heads=2.0 * num_predictions * dim * (dim + vocab_size),
            kept_by_norms=float(num_predictions * (2 * vocab_size + dim)),
            kept_by_products=3.0 * num_predictions * dim,
        )
