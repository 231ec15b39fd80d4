"""Runs the experts of transformers by a dispatcher of ours, through its registry of back-ends for experts.

    their block:  experts(hidden, indices, weights) -> registry -> run_by_ours -> plan -> dispatcher -> tokens

AutoDispatcher measures the model's own back-end beside ours, and leaves the experts to it where it is faster.

Indices and weights are those that the block gives its experts. A choice of weight 0 is not run: it is one that the
capacity has dropped, or one that adds nothing. Experts are described by what transformers says of them to its own
back-ends: gate or none, biases or none, which axis is the input's, a norm behind the last matrix or none.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.model.dispatch import AutoDispatcher, Dispatcher, DispatchRecord, Experts
from lightning_moevlm.model.dispatch.expert_protocol import Activation, Linear

BACKEND = "lightning_moevlm"
"""Our name in the registry of transformers."""
_IN_USE = "_experts_implementation"
"""Where a configuration of transformers keeps the name of its back-end."""


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


class _TheirBackend(Dispatcher):
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


class OurDispatch(DispatchRecord):
    """Runs their experts, and names the way and what became of their router.

    Args:
        dispatcher: of ours, of this layer alone.
        router: note on their router, for the record.
    """

    def __init__(self, dispatcher: Dispatcher, router: str) -> None:
        self.dispatcher, self._router = dispatcher, router

    def __call__(self, theirs: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        experts = StackedExperts(theirs, weight_TK.dtype)
        plan = _plan(len(experts.stacks()[0]), hidden_TD, index_TK, weight_TK)
        return self.dispatcher.run_pairs(plan, hidden_TD, experts)

    def record(self) -> str:
        """Return what runs, and a note on the router."""
        return f"{self.dispatcher.record()}{self._router}"

    def choices(self) -> dict[str, str]:
        """Return those of the dispatcher."""
        return self.dispatcher.choices()

    def in_use(self) -> tuple[str, ...]:
        """Return those of the dispatcher, and the note."""
        return tuple(f"{name}{self._router}" for name in self.dispatcher.in_use())


def take_over(model: Any, layers: dict[str, Any]) -> None:
    """Let the dispatchers of adopted layers run the experts of a model, in place.

    Args:
        model: of transformers.
        layers: by their path; their `dispatcher` is an `OurDispatch`.

    Raises:
        UserError: experts that transformers runs in one way alone.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(BACKEND, run_by_ours)
    all_experts = {path: model.get_submodule(path.rpartition(".")[0]).experts for path in layers}
    own = {path: getattr(getattr(each, "config", None), _IN_USE, None) for path, each in all_experts.items()}
    model.set_experts_implementation(BACKEND)
    for path, layer in layers.items():
        experts = all_experts[path]
        config = getattr(experts, "config", None)
        if not hasattr(experts, "has_gate") or getattr(config, _IN_USE, None) != BACKEND:
            raise UserError(
                f"model.backbone.dispatcher: {type(experts).__name__} of {type(model).__name__} takes no back-end, so "
                "transformers alone can run it: set it to null"
            )
        experts.adopted_by = (layer,)  # in a tuple: not a part
        dispatcher, backend = layer.dispatcher.dispatcher, own[path]
        if isinstance(dispatcher, AutoDispatcher) and backend is not None:
            dispatcher.consider(f"transformers, {backend}", _TheirBackend(backend))


def run_by_ours(theirs: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run experts of transformers as a back-end of its registry; returns (T, D)."""
    (layer,) = theirs.adopted_by
    result: Tensor = layer.dispatcher(theirs, hidden_states, top_k_index, top_k_weights)
    return result


def give_back(model: Any) -> None:
    """Let transformers run its experts by its own choice again, in place."""
    model.set_experts_implementation(None)
    for module in model.modules():
        if hasattr(module, "adopted_by"):
            del module.adopted_by


def _plan(num_experts: int, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> PairPlan:
    num_tokens, num_choices = index_TK.shape
    device = hidden_TD.device
    expert_N, weight_N = index_TK.t().reshape(-1).long(), weight_TK.t().reshape(-1).float()
    kept_N = weight_N.detach() != 0
    unread_TE = torch.zeros((), device=device).expand(num_tokens, num_experts)
    return PairPlan(
        token_N=torch.arange(num_tokens, device=device).repeat(num_choices),
        expert_N=expert_N,
        weight_N=weight_N,
        chosen_N=kept_N,
        kept_N=kept_N,
        logits_TE=unread_TE,
        probs_TE=unread_TE,
        modality_T=torch.full((num_tokens,), int(Modality.TEXT), device=device),
        valid_T=torch.ones(num_tokens, dtype=torch.bool, device=device),
    )
