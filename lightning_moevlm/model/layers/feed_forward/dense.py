"""The dense feed-forward, and the twin that costs what a sparse one costs."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout
from lightning_moevlm.model.layers.feed_forward.feed_forward import FeedForward, FFNOutput
from lightning_moevlm.model.layers.norms import NormKind, make_norm, normalise
from lightning_moevlm.model.precision import PrecisionPolicy


class DenseFFN(FeedForward):
    """GELU(x W_up) W_down without bias.

    Args:
        dim: model width D.
        hidden_dim: hidden width F.

    Raises:
        UserError: no hidden unit.
    """

    precision = PrecisionPolicy()

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        check_number("hidden_dim", hidden_dim, least=1)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        self.hidden_norm: nn.Module | None = None  # see add_hidden_norm

    def add_hidden_norm(self, kind: NormKind) -> None:
        """Normalise the hidden units before the last matrix."""
        self.hidden_norm = make_norm(kind, self.up.out_features)

    def forward(self, tokens_BSD: Tensor, layout: Layout) -> FFNOutput:
        """Apply to every position; the layout does not matter."""
        return FFNOutput(self.down(normalise(F.gelu(self.up(tokens_BSD)), self.hidden_norm, self.precision)), ())

    def forward_flops(self, num_tokens: Mapping[Modality, int]) -> float:
        """4 D F per token."""
        return 4.0 * self.up.in_features * self.up.out_features * sum(num_tokens.values())


def dense_twin(sparse: FeedForward, dim: int, num_tokens: Mapping[Modality, int]) -> DenseFFN:
    """Return the dense feed-forward whose FLOPs on such a sequence equal the active ones of a sparse one, with routers.

    Solves 4 D F T = active FLOPs on T tokens for the hidden width F, rounded to the nearest integer. Compared at equal
    active FLOPs, not at equal parameters: the unused experts cost memory, not arithmetic.
    """
    total = sum(num_tokens.values())
    return DenseFFN(dim, max(1, round(sparse.forward_flops(num_tokens) / (4 * dim * total))))
