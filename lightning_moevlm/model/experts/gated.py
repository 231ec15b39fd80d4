"""Gated experts (SwiGLU): (SiLU(x W_gate) * x W_up) W_down. Shazeer 2020 (arXiv 2002.05202)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.model.dispatch.expert_protocol import Activation, Linear
from lightning_moevlm.model.experts.expert_stack import ExpertStack


class GatedExperts(ExpertStack):
    """E SwiGLU feed-forwards without bias.

    Args:
        dim: model width D.
        num_experts: E.
        hidden_dim: hidden width F of one expert.
        dropout: share of hidden units left out in training (expert dropout, arXiv 2101.03961, section 2.4), drawn per
            row, so it differs between dispatchers.
        init: initial weights.
    """

    def add_stacks(self) -> None:
        """Create gate_EDF, up_EDF and down_EFD."""
        num_experts, dim, hidden_dim = self.num_experts, self.dim, self.hidden_dim
        self.gate_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.up_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.down_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def stacks(self) -> tuple[Tensor, ...]:
        """Return (gate_EDF, up_EDF, down_EFD)."""
        return self.gate_EDF, self.up_EDF, self.down_EFD

    def run(self, rows_ND: Tensor, weights: tuple[Tensor, ...], linear: Linear) -> Tensor:
        """Return (SiLU(x W_gate) * x W_up) W_down."""
        gate, up, down = weights
        hidden_NF = _swiglu(linear(rows_ND, gate), linear(rows_ND, up))
        return linear(F.dropout(hidden_NF, self.dropout, self.training), down)

    def activation(self) -> Activation | None:
        """SiLU(gate) * up; none while dropout draws at random."""
        if self.training and self.dropout:
            return None
        return Activation(_swiglu, _swiglu_backward)

    def forward_flops_per_row(self) -> int:
        """6 D F."""
        return 6 * self.dim * self.hidden_dim


def _swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    return F.silu(gate_NF) * up_NF


def _swiglu_backward(gradient_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    activated_NF = F.silu(gate_NF)
    gate_gradient_NF = torch.ops.aten.silu_backward(gradient_NF * up_NF, gate_NF)
    return activated_NF * up_NF, (gate_gradient_NF, gradient_NF * activated_NF)
