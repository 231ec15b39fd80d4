"""Experts that compute what a dense feed-forward of transformers computes: any activation function, gate and biases."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_moevlm.model.dispatch.expert_protocol import Activation, Linear
from lightning_moevlm.model.experts import ExpertStack

_NAMES = {
    "gate": "gate_EDF",
    "gate_bias": "gate_bias_E1F",
    "up": "up_EDF",
    "up_bias": "up_bias_E1F",
    "down_bias": "down_bias_E1D",
    "down": "down_EFD",
}
"""Names of parameters by part, in the order of the stacks: into the hidden units first, out of them last."""


class UpcycledExperts(ExpertStack):
    """E feed-forwards a(x W_gate + b) * (x W_up + b) W_down + b, or without the gate, or without biases.

    A bias is a stack (E, 1, out) that multiplies rows of ones, so every dispatcher can run it.

    Args:
        dim: model width D.
        num_experts: E.
        hidden_dim: hidden width F of one expert.
        parts: names of its matrices and biases: gate, up, down, gate_bias, up_bias, down_bias.
        function: a, elementwise and without parameters.
        dtype: of the weights.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_dim: int,
        parts: frozenset[str],
        function: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(dim, num_experts, hidden_dim)
        self.function = function
        sizes = {"gate": (dim, hidden_dim), "up": (dim, hidden_dim), "down": (hidden_dim, dim)}
        for key in _NAMES:
            if key in parts:
                size_in, size_out = sizes[key.removesuffix("_bias")]
                shape = (num_experts, 1 if key.endswith("_bias") else size_in, size_out)
                self.register_parameter(_NAMES[key], nn.Parameter(torch.empty(shape, dtype=dtype)))

    def parts(self) -> dict[str, nn.Parameter]:
        """Return the stacks by part."""
        own = dict(self.named_parameters(recurse=False))
        return {key: own[name] for key, name in _NAMES.items() if name in own}

    def stacks(self) -> tuple[Tensor, ...]:
        """Return the stacks, a gate first and the last matrix last."""
        return tuple(self.parts().values())

    def run(self, rows_ND: Tensor, weights: tuple[Tensor, ...], linear: Linear) -> Tensor:
        """Apply the feed-forward to rows."""
        named = dict(zip(self.parts(), weights, strict=True))

        def product(rows: Tensor, part: str) -> Tensor:
            out = linear(rows, named[part])
            bias = named.get(f"{part}_bias")
            return out if bias is None else out + linear(rows.new_ones(len(rows), 1), bias)

        if "gate" not in named:
            return product(self.function(product(rows_ND, "up")), "down")
        return product(self.function(product(rows_ND, "gate")) * product(rows_ND, "up"), "down")

    def activation(self) -> Activation | None:
        """Return a(gate) * up, or a(up); None with biases."""
        if any(part.endswith("_bias") for part in self.parts()):
            return None
        return Activation(self._unit, self._unit_backward)

    def forward_flops_per_row(self) -> int:
        """2 FLOPs for each number of one expert's matrices."""
        return 2 * self.dim * self.hidden_dim * sum(not part.endswith("_bias") for part in self.parts())

    def _unit(self, *products: Tensor) -> Tensor:
        activated_NF = self.function(products[0])
        return activated_NF if len(products) == 1 else activated_NF * products[1]

    def _unit_backward(self, gradient_NF: Tensor, *products: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.enable_grad():
            leaves = [product.detach().requires_grad_() for product in products]
            hidden_NF = self._unit(*leaves)
        return hidden_NF.detach(), torch.autograd.grad(hidden_NF, leaves, gradient_NF)
