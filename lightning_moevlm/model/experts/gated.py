"""Gated experts (SwiGLU): (SiLU(x W_gate) * x W_up) W_down. Shazeer 2020 (arXiv 2002.05202)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.model.dispatch.expert_protocol import Activation, Linear
from lightning_moevlm.model.experts.expert_stack import ExpertStack
from lightning_moevlm.model.experts.gated_unit import GLU, gated_unit, gated_unit_backward


class GatedExperts(ExpertStack):
    """E SwiGLU feed-forwards without bias.

    Args:
        dim: model width D.
        num_experts: E.
        hidden_dim: hidden width F of one expert.
        dropout: share of hidden units left out in training (expert dropout, arXiv 2101.03961, section 2.4), drawn per
            row, so it differs between dispatchers.
        init: initial weights.

    The switch `stabilisers.glu` of a model bounds the unit; see `gated_unit.py`.
    """

    glu: GLU = None

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
        hidden_NF = gated_unit(linear(rows_ND, gate), linear(rows_ND, up), self.glu)
        return linear(F.dropout(hidden_NF, self.dropout, self.training), down)

    def activation(self) -> Activation | None:
        """SiLU(gate) * up, or a bounded form of it; none while dropout draws at random."""
        if self.training and self.dropout:
            return None
        return Activation(partial(gated_unit, glu=self.glu), partial(gated_unit_backward, glu=self.glu))

    def forward_flops_per_row(self) -> int:
        """6 D F."""
        return 6 * self.dim * self.hidden_dim
