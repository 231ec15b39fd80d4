"""A mixture of another code base as one of our layers: its router replaced by a layer that makes plans.

    their block:  hidden -> router -> (logits, weights, indices) -> their experts -> tokens
    here:         hidden -> [ plan of their router, or of one of ours ] -> the same triple

Experts, shared experts and residual stay theirs. The weights and indices that their experts get are read from the plan,
so whatever changes the plan changes the model. A choice over the capacity weighs 0.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.model.backbones.adopted.routing._their_router import TheirBiasRouter, TheirRouter
from lightning_moevlm.model.backbones.adopted.routing.current_pass import CurrentPass, spread
from lightning_moevlm.model.backbones.adopted.routing.our_dispatch import OurDispatch
from lightning_moevlm.model.backbones.adopted.routing.replace import Replacement
from lightning_moevlm.model.backbones.adopted.routing.seam import Gate
from lightning_moevlm.model.dispatch import Capacity, Dispatcher, DispatchRecord, apply_capacity
from lightning_moevlm.model.experts import ExpertWeights
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.model.layers.feed_forward.feed_forward import RoutedPlan
from lightning_moevlm.model.precision import region
from lightning_moevlm.model.routers.choices import list_choices


class AdoptedMoE(Mixture):
    """Stands where their router stood; to readers of layers it is a mixture.

    Args:
        theirs: their router; kept in `router` unless another one is given.
        gate: what their router returns.
        experts: theirs; they stay in their block, which owns them.
        current: what the running pass is about.
        modality: of the only tokens that the block may get without the others.
        replacement: one of ours in place of theirs.
        bias_rate: moves the bias of theirs, see `TheirBiasRouter`.
        capacity: of experts; None is dropless.
        dispatcher: runs their experts, see `our_dispatch.take_over`; None leaves them to transformers.

    Raises:
        UserError: a dispatcher that could not serve the capacity.
    """

    keeps_weights = True  # see `initialise`

    def __init__(
        self,
        theirs: nn.Module,
        gate: Gate,
        experts: nn.Module,
        current: CurrentPass,
        modality: Modality | None = None,
        replacement: Replacement | None = None,
        bias_rate: float | None = None,
        capacity: Capacity | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_experts = gate.dim, gate.num_experts
        if replacement is not None:
            self.router = replacement.router
        else:
            self.router = TheirRouter(theirs, gate) if bias_rate is None else TheirBiasRouter(theirs, gate, bias_rate)
        self.factor = 1.0 if replacement is None else replacement.factor
        self.experts = TheirExperts(experts, gate)
        note = "" if replacement is None else _describe(replacement)
        if dispatcher is not None:
            dispatcher.check(capacity)
        self.dispatcher = TheirDispatch(experts, note) if dispatcher is None else OurDispatch(dispatcher, note)
        self.capacity = capacity
        self.factor_in_force = self.choose = None
        self.free = self.shared = self.hidden_norm = self.shared_hidden_norm = None
        self.path = ""
        self.replaced: tuple[nn.Module, ...] = ()  # in a tuple: not a part any more
        self.current, self.modality, self.order = current, modality, gate

    @property
    def theirs(self) -> nn.Module:
        """The router that stood here."""
        return self.router.theirs if isinstance(self.router, TheirRouter) else self.replaced[0]

    def forward(self, hidden: Tensor, *more: Any, **named: Any) -> "Triple":
        """Route the tokens, and return what their block expects of its router."""
        tokens_TD = hidden.reshape(-1, hidden.shape[-1])
        if hidden.dtype is torch.float64 and isinstance(self.dispatcher, TheirDispatch):
            self.dispatcher.refuse_float64()
        places = self.current.place(tokens_TD, self.modality)
        if isinstance(self.router, TheirRouter):
            plan = self.router(places.inputs, hidden, more, named)
            made, results = self.router.take_last()
        else:
            plan, made, results = self._route(places.inputs), None, ()
        tokens = self.current.tokens
        whole = plan if places.index_T is None else spread(plan, places.index_T, tokens)
        if self.capacity is not None:  # groups are of whole sequences
            whole = apply_capacity(whole, self.capacity, self.training, self.factor_in_force)
            plan = plan._replace(kept_N=whole.kept_N)
        triple = Triple(results if plan is made else self._replace(plan, results)) if results else _answer(plan, hidden)
        modalities = tokens.modalities if self.modality is None or places.index_T is None else (self.modality,)
        routed = RoutedPlan(self.path, modalities, whole)
        self.current.record(routed)
        triple.plans = (routed,)
        return triple

    def _route(self, inputs: RoutingInput) -> PairPlan:
        with region(self.precision, "router", inputs.tokens_TD.device.type) as cast:
            inputs = inputs._replace(tokens_TD=cast(inputs.tokens_TD))
            if self.choose is not None and self.training:
                inputs = inputs._replace(expert_TK=self.choose(inputs))
            plan = self.router(inputs)
        assert isinstance(plan, PairPlan), "checked when it was adopted"
        return plan if self.factor == 1.0 else plan._replace(weight_N=plan.weight_N * self.factor)

    def _replace(self, plan: PairPlan, results: tuple[Tensor, ...]) -> list[Tensor]:
        """Return their results with weights and indices of another plan, which a hook has made of their router's."""
        answer = list(results)
        weight_TK = _used_weights(plan)
        for place, values_TK in ((self.order.indices, list_choices(plan)), (self.order.weights, weight_TK)):
            like = results[place]
            answer[place] = values_TK.to(like.dtype).reshape(like.shape)
        return answer

    def idle_parameters(self) -> float:
        """Parameters of the experts that a token does not visit."""
        stored = sum(parameter.numel() for parameter in self.experts.parameters())
        return stored * (1 - min(1.0, self.router.experts_per_token / self.num_experts))

    def costs(self, num_tokens: Mapping[Modality, int], separate: bool = False) -> Costs:
        """Router and the experts that run; what the backward pass keeps is that of a gated feed-forward."""
        total = sum(num_tokens.values())
        rows = total * self.router.experts_per_token
        return Costs(
            router=float(self.router.forward_flops_per_token() * total),
            experts=rows * self.experts.forward_flops_per_row(),
            kept_by_norms=2.0 * total * self.num_experts,
            kept_by_products=total * self.dim + rows * self.experts.forward_flops_per_row() / 2 / self.dim,
        )


def _answer(plan: PairPlan, hidden: Tensor) -> "Triple":
    """Return what a block expects of its router, from a plan of ours."""
    weight_TK = _used_weights(plan).to(hidden.dtype).contiguous()
    return Triple((plan.logits_TE, weight_TK, list_choices(plan).contiguous()))


def _used_weights(plan: PairPlan) -> Tensor:
    """Return the weights of each token, (T, K); 0 for choices that are not used or over the capacity.

    Padding runs as it does in their model, so that nothing differs.
    """
    used_N = plan.kept_N | ~plan.valid_T[plan.token_N]
    return torch.where(used_N, plan.weight_N, 0.0).view(-1, plan.num_tokens).t()


def _describe(replacement: Replacement) -> str:
    origin = "with the model's weights" if replacement.carries else "from new weights"
    return f", {type(replacement.router).__name__} {origin}"


class Triple(tuple):
    """The results of a router in their order, with the plans that they stand for."""

    plans: tuple[RoutedPlan, ...] = ()


class TheirExperts(ExpertWeights):
    """A view of experts that belong to another module.

    Args:
        theirs: with stacked weights; experts in a list have no stacks.
        gate: of their router.
    """

    def __init__(self, theirs: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.dim, self.num_experts = gate.dim, gate.num_experts
        self._theirs = (theirs,)  # in a tuple: not a part, or its weights would be in the checkpoint twice

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Return those of the experts."""
        return self._theirs[0].named_parameters(*args, **kwargs)

    def stacks(self) -> tuple[Tensor, ...]:
        """Return their weights as (E, in, out); of a gate and its values in one matrix, the gate alone."""
        theirs = self._theirs[0]
        found = [parameter for parameter in theirs.parameters(recurse=False) if parameter.ndim == 3]
        turned = [each if getattr(theirs, "is_transposed", False) else each.transpose(1, 2) for each in found]
        if not turned or not getattr(theirs, "has_gate", False):
            return tuple(turned)
        first = turned[0]
        first = first[..., : first.shape[-1] // 2] if getattr(theirs, "is_concatenated", True) else first[..., ::2]
        return (first, *turned[1:])

    def forward_flops_per_row(self) -> int:
        """2 FLOPs for each number of one expert's matrices."""
        return 2 * sum(p.numel() for p in self._theirs[0].parameters() if p.ndim >= 2) // self.num_experts


class TheirDispatch(DispatchRecord):
    """Names the way in which transformers runs the experts, and what became of its router.

    Args:
        theirs: the experts.
        router: note on the router.
    """

    def __init__(self, theirs: nn.Module, router: str) -> None:
        self._config = getattr(theirs, "config", None)  # not the experts: a rehearsal of a step copies dispatchers
        self._router = router

    def record(self) -> str:
        """Return the back-end of the configuration."""
        return f"transformers, {getattr(self._config, '_experts_implementation', None) or 'eager'}{self._router}"

    def in_use(self) -> tuple[str, ...]:
        """Return the same."""
        return (self.record(),)

    def refuse_float64(self) -> None:
        """Refuse the back-end that has no kernel for it."""
        if getattr(self._config, "_experts_implementation", None) == "grouped_mm":
            raise UserError(
                "trainer.precision is 64-true, and grouped_mm, in which transformers runs the experts, takes no "
                "float64: set model.backbone.experts_backend to eager, or model.backbone.dispatcher to LoopDispatcher"
            )
