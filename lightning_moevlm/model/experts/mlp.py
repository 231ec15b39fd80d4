"""Two-layer experts without bias: GELU(x W_up) W_down."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.model.dispatch.expert_protocol import Activation, Linear
from lightning_moevlm.model.experts.expert_stack import ExpertStack


class MLPExperts(ExpertStack):
    """E multilayer perceptrons, exact (erf) GELU: the tanh form is four times slower on CPUs.

    Args:
        dim: model width D.
        num_experts: E.
        hidden_dim: hidden width F of one expert.
        dropout: share of hidden units left out in training (expert dropout, arXiv 2101.03961, section 2.4), drawn per
            row, so it differs between dispatchers.
        init: initial weights.
    """

    def add_stacks(self) -> None:
        """Create up_EDF and down_EFD."""
        num_experts, dim, hidden_dim = self.num_experts, self.dim, self.hidden_dim
        self.up_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.down_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def stacks(self) -> tuple[Tensor, ...]:
        """Return (up_EDF, down_EFD)."""
        return self.up_EDF, self.down_EFD

    def run(self, rows_ND: Tensor, weights: tuple[Tensor, ...], linear: Linear) -> Tensor:
        """Return GELU(x W_up) W_down."""
        up, down = weights
        hidden_NF = F.gelu(linear(rows_ND, up))
        return linear(F.dropout(hidden_NF, self.dropout, self.training), down)

    def activation(self) -> Activation | None:
        """GELU; none while dropout draws at random."""
        if self.training and self.dropout:
            return None
        return Activation(F.gelu, _gelu_backward)

    def forward_flops_per_row(self) -> int:
        """4 D F."""
        return 4 * self.dim * self.hidden_dim


def _gelu_backward(gradient_NF: Tensor, product_NF: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return F.gelu(product_NF), (torch.ops.aten.gelu_backward(gradient_NF, product_NF),)
