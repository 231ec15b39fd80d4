"""Runs the experts of transformers by a dispatcher of ours, through its registry of back-ends for experts.

    their block:  experts(hidden, indices, weights) -> registry -> run_by_ours -> plan -> dispatcher -> tokens

AutoDispatcher measures the model's own back-end beside ours, and leaves the experts to it where it is faster.

Indices and weights are those that the block gives its experts. A choice of weight 0 is not run: it is one that the
capacity has dropped, or one that adds nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.model.backbones.adopted.routing._their_backend import StackedExperts, TheirBackend
from lightning_moevlm.model.dispatch import AutoDispatcher, Dispatcher, DispatchRecord

BACKEND = "lightning_moevlm"
"""Our name in the registry of transformers."""


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
    own = {path: _backend_of(each) for path, each in all_experts.items()}
    model.set_experts_implementation(BACKEND)
    for path, layer in layers.items():
        experts = all_experts[path]
        if not hasattr(experts, "has_gate") or _backend_of(experts) != BACKEND:
            raise UserError(
                f"model.backbone.dispatcher: {type(experts).__name__} of {type(model).__name__} takes no back-end, so "
                "transformers alone can run it: set it to null"
            )
        experts.adopted_by = (layer,)  # in a tuple: not a part
        dispatcher, backend = layer.dispatcher.dispatcher, own[path]
        if isinstance(dispatcher, AutoDispatcher) and backend is not None:
            dispatcher.consider(f"transformers, {backend}", TheirBackend(backend))


def _backend_of(experts: nn.Module) -> str | None:
    """Return the name that the configuration of experts keeps."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)


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
        token_N=torch.arange(num_tokens, device=device).expand(num_choices, num_tokens).reshape(-1),
        expert_N=expert_N,
        weight_N=weight_N,
        chosen_N=kept_N,
        kept_N=kept_N,
        logits_TE=unread_TE,
        probs_TE=unread_TE,
        modality_T=torch.full((num_tokens,), int(Modality.TEXT), device=device),
        valid_T=torch.ones(num_tokens, dtype=torch.bool, device=device),
        num_choices=num_choices,
    )
