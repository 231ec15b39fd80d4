"""Experts of transformers as dispatchers take them, and its own back-ends as one of our dispatchers.

Experts are described by what transformers says of them to its back-ends: gate or none, biases or none, which axis is
the input's, a norm behind the last matrix or none.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch import Dispatcher, Experts
from lightning_moevlm.model.dispatch.expert_protocol import Activation, Linear


class StackedExperts:
    """Stacked experts of transformers, as dispatchers take them; a bias is a stack (E, 1, out), as in upcycled experts.

    Args:
        theirs: with the attributes that transformers gives experts which its back-ends can run.
        weight_dtype: of the weights that their block gives them.
    """

    def __init__(self, theirs: Any, weight_dtype: torch.dtype = torch.float32) -> None:
        self._theirs, self._weight_dtype = theirs, weight_dtype
        self._names = [f"{'gate_up' if theirs.has_gate else 'up'}_proj", "down_proj"]
        if theirs.has_bias:
            first, last = self._names
            self._names = [first, f"{first}_bias", f"{last}_bias", last]  # out of the hidden units last

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield theirs."""
        found: Iterator[nn.Parameter] = self._theirs.parameters()
        return found

    def run_by(self, backend: str, plan: PairPlan, hidden_TD: Tensor) -> Tensor:
        """Run a plan that `OurDispatch` made by a back-end of transformers; returns (T, D)."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        eager = type(self._theirs).forward.__wrapped__  # below the choice of a back-end
        weight_N = torch.where(plan.kept_N, plan.weight_N, 0.0).to(self._weight_dtype)
        index_TK, weight_TK = (each_N.view(-1, plan.num_tokens).t() for each_N in (plan.expert_N, weight_N))
        found: Tensor = ALL_EXPERTS_FUNCTIONS.get(backend, eager)(self._theirs, hidden_TD, index_TK, weight_TK)
        return found

    def stacks(self) -> tuple[Tensor, ...]:
        """Return the stacks (E, in, out); gate and up are one."""
        found = {name: getattr(self._theirs, name) for name in self._names}
        return tuple(
            each.unsqueeze(1) if each.ndim == 2 else each if self._theirs.is_transposed else each.transpose(1, 2)
            for each in found.values()
        )

    def run(self, rows_ND: Tensor, weights: tuple[Tensor, ...], linear: Linear) -> Tensor:
        """Apply the feed-forward to rows."""
        named = dict(zip(self._names, weights, strict=True))

        def product(rows: Tensor, name: str) -> Tensor:
            out, bias = linear(rows, named[name]), named.get(f"{name}_bias")
            return out if bias is None else out + linear(rows.new_ones(len(rows), 1), bias)

        rows_ND = product(self._unit(product(rows_ND, self._names[0])), self._names[-1])
        return self._theirs.post_expert_norm(rows_ND) if self._theirs.has_post_expert_norm else rows_ND

    def activation(self) -> Activation | None:
        """Return what is between the two matrices; None with biases or a norm behind the last one."""
        if self._theirs.has_bias or self._theirs.has_post_expert_norm:
            return None
        return Activation(self._unit, self._unit_backward)

    def _unit(self, product: Tensor) -> Tensor:
        hidden: Tensor = (self._theirs._apply_gate if self._theirs.has_gate else self._theirs.act_fn)(product)
        return hidden

    def _unit_backward(self, gradient_NF: Tensor, product: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.enable_grad():
            leaf = product.detach().requires_grad_()
            hidden_NF = self._unit(leaf)
        return hidden_NF.detach(), torch.autograd.grad(hidden_NF, (leaf,), gradient_NF)


class TheirBackend(Dispatcher):
    """Runs experts of transformers as it would itself.

    Args:
        backend: its name of the way, eager or one of its registry.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        assert isinstance(experts, StackedExperts)
        return experts.run_by(self._backend, plan, tokens_TD)
