"""The dense feed-forward, and the twin that costs what a sparse one costs."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout
from lightning_moevlm.model.experts import GLU, gated_unit, kept_by_unit
from lightning_moevlm.model.layers.feed_forward.feed_forward import FeedForward, FFNOutput
from lightning_moevlm.model.layers.norms import NormKind, make_norm, normalise
from lightning_moevlm.model.precision import PrecisionPolicy


class DenseFFN(FeedForward):
    """GELU(x W_up) W_down without bias, or gated: (SiLU(x W_gate) * x W_up) W_down (SwiGLU, arXiv 2002.05202).

    The switch `stabilisers.glu` bounds the gated unit; see `experts/gated_unit.py`.

    Args:
        dim: model width D.
        hidden_dim: hidden width F.
        is_gated: SwiGLU, from which `GatedExperts` can start.

    Raises:
        UserError: no hidden unit.
    """

    precision = PrecisionPolicy()
    glu: GLU = None

    def __init__(self, dim: int, hidden_dim: int, is_gated: bool = False) -> None:
        super().__init__()
        check_number("hidden_dim", hidden_dim, least=1)
        self.gate = nn.Linear(dim, hidden_dim, bias=False) if is_gated else None
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        self.hidden_norm: nn.Module | None = None  # see add_hidden_norm

    def add_hidden_norm(self, kind: NormKind) -> None:
        """Normalise the hidden units before the last matrix."""
        self.hidden_norm = make_norm(kind, self.up.out_features)

    def forward(self, tokens_BSD: Tensor, layout: Layout) -> FFNOutput:
        """Apply to every position; the layout does not matter."""
        hidden_BSF = self.up(tokens_BSD)
        hidden_BSF = (
            F.gelu(hidden_BSF) if self.gate is None else gated_unit(self.gate(tokens_BSD), hidden_BSF, self.glu)
        )
        return FFNOutput(self.down(normalise(hidden_BSF, self.hidden_norm, self.precision)), ())

    def costs(self, num_tokens: Mapping[Modality, int], separate: bool = False) -> Costs:
        """4 D F FLOPs per token, gated 6 D F; its input is kept, and the hidden units before and after each step."""
        total, dim, hidden_dim = sum(num_tokens.values()), self.up.in_features, self.up.out_features
        return Costs(
            feed_forward=(4.0 if self.gate is None else 6.0) * dim * hidden_dim * total,
            kept_by_norms=float(total * hidden_dim * (self.hidden_norm is not None)),
            kept_by_products=float(total * (dim + (2 if self.gate is None else kept_by_unit(self.glu)) * hidden_dim)),
        )


def dense_twin(sparse: FeedForward, dim: int, num_tokens: Mapping[Modality, int]) -> DenseFFN:
    """Return the dense feed-forward whose FLOPs on such a sequence equal the active ones of a sparse one, with routers.

    Solves 4 D F T = active FLOPs on T tokens for the hidden width F, rounded to the nearest integer. Compared at equal
    active FLOPs, not at equal parameters: the unused experts cost memory, not arithmetic.
    """
    total = sum(num_tokens.values())
    return DenseFFN(dim, max(1, round(sparse.costs(num_tokens).flops / (4 * dim * total))))
