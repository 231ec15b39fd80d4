"""The mixture-of-experts feed-forward: route, limit, dispatch."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput, RoutingPlan
from lightning_moevlm.contracts.sequence_layout import Layout
from lightning_moevlm.model.dispatch import (
    AutoDispatcher,
    Capacity,
    Dispatcher,
    Experts,
    apply_capacity,
    run_everywhere,
)
from lightning_moevlm.model.experts import ExpertStack, FreeExperts, MLPExperts, leave_out_free
from lightning_moevlm.model.layers.attention import Attention
from lightning_moevlm.model.layers.feed_forward.feed_forward import FeedForward, FFNOutput, RoutedPlan, count_parameters
from lightning_moevlm.model.layers.feed_forward.mixture import Mixture
from lightning_moevlm.model.layers.feed_forward.sub_norm import SubNormedExperts
from lightning_moevlm.model.layers.norms import NormKind, make_norm
from lightning_moevlm.model.precision import region
from lightning_moevlm.model.routers import Router, TopKRouter


class MoEFFN(Mixture, FeedForward):
    """Sparse feed-forward: each token runs through the experts that the router gives it.

    Args:
        dim: model width D.
        num_experts: E.
        router: factory (dim, num_experts) -> Router.
        experts: factory (dim, num_experts) -> ExpertStack.
        capacity: factors and priority; null is dropless.
        dispatcher: the way to run a plan; null is AutoDispatcher.
        shared: factory (dim, num_shared) -> ExpertStack of experts that every token visits beside its routed ones, with
            weight 1 (DeepSeekMoE, arXiv 2401.06066, section 3.2); null is none.
        num_shared: number of shared experts.
        free: factory (dim) -> FreeExperts, which the router may choose beside the E others, and which cost nothing;
            null is none.

    Raises:
        UserError: num_experts or num_shared below 1, a dispatcher that could not serve the capacity, or free experts
            with a router that cannot choose them.
    """

    experts: ExpertStack
    dispatcher: Dispatcher
    start_difference: float | None = None  # to the dense layer that it was made of, over its largest output

    def __init__(
        self,
        dim: int,
        num_experts: int = 8,
        router: Callable[[int, int], Router] = TopKRouter,
        experts: Callable[[int, int], ExpertStack] = MLPExperts,
        capacity: Capacity | None = None,
        dispatcher: Dispatcher | None = None,
        shared: Callable[[int, int], ExpertStack] | None = None,
        num_shared: int = 1,
        free: Callable[[int], FreeExperts] | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise UserError(f"moe.num_experts is {num_experts}: a mixture needs at least 1 expert")
        if num_shared < 1:
            raise UserError(f"moe.num_shared is {num_shared}: choose at least 1, or leave moe.shared null for none")
        self.dim = dim
        self.num_experts = num_experts
        self.free = None if free is None else free(dim)
        num_free = 0 if self.free is None else self.free.num_free
        self.router = router(dim, num_experts + num_free)
        self.router.set_free(num_free)
        self.experts = experts(dim, num_experts)
        self.capacity = capacity
        self.factor_in_force = None
        self.choose = None
        self.shared = None if shared is None else shared(dim, num_shared)
        self.dispatcher = dispatcher or AutoDispatcher()
        self.dispatcher.check(capacity)
        self.hidden_norm = self.shared_hidden_norm = None  # see add_hidden_norm
        self.path = ""

    def add_hidden_norm(self, kind: NormKind) -> None:
        """Normalise the hidden units before the last matrix; the experts share the norm's scale."""
        self.hidden_norm = make_norm(kind, self.experts.stacks()[-1].shape[1])
        if self.shared is not None:
            self.shared_hidden_norm = make_norm(kind, self.shared.stacks()[-1].shape[1])

    def forward(self, tokens_BSD: Tensor, layout: Layout) -> FFNOutput:
        """Route and run; padding and dropped tokens come out as zeros for the residual to carry."""
        batch, length, dim = tokens_BSD.shape
        tokens_TD = tokens_BSD.reshape(batch * length, dim)
        modality_T = layout.modality_BS.reshape(-1)
        identity_T = None if layout.identity_BS is None else layout.identity_BS.reshape(-1)
        plan = self.route(RoutingInput(tokens_TD, modality_T, layout.valid_BS.reshape(-1), batch, identity_T))
        out_TD = self._compute(plan, tokens_TD)
        modalities = tuple(dict.fromkeys(span.modality for span in layout.spans))
        return FFNOutput(out_TD.reshape(batch, length, dim), (RoutedPlan(self.path, modalities, plan),))

    def route(self, inputs: RoutingInput) -> RoutingPlan:
        """Return the plan of the tokens, within the capacity."""
        with region(self.precision, "router", inputs.tokens_TD.device.type) as cast:
            inputs = inputs._replace(tokens_TD=cast(inputs.tokens_TD))
            if self.choose is not None and self.training:
                inputs = inputs._replace(expert_TK=self.choose(inputs))
            plan: RoutingPlan = self.router(inputs)
        return self._limit(plan) if isinstance(plan, PairPlan) else plan  # slots are never over a capacity

    def costs(self, num_tokens: Mapping[Modality, int], separate: bool = False) -> Costs:
        """Router plus the experts that run, of one sequence; nothing is counted as dropped.

        Kept of each token: the input and the router's logits and probabilities; of each row of an expert: its input
        and output, and the hidden units before and after the activation function.
        """
        total = sum(num_tokens.values())
        rows = self.router.expert_rows(total)
        experts, kept = rows * self.experts.forward_flops_per_row(), rows * _kept_per_row(self.experts)
        if self.shared is not None:
            rows = total * self.shared.num_experts
            experts += rows * self.shared.forward_flops_per_row()
            kept += rows * _kept_per_row(self.shared)
        return Costs(
            router=float(self.router.forward_flops_per_token() * total),
            experts=float(experts),
            kept_by_norms=2.0 * total * self.router.num_experts,
            kept_by_products=float(total * self.dim + kept),
        )

    def active_parameters(self, modalities: Collection[Modality], separate: bool = False) -> float:
        """All but the experts that a token does not visit."""
        return count_parameters(self) - self.idle_parameters()

    def idle_parameters(self) -> float:
        """Parameters of the experts that a token does not visit."""
        return count_parameters(self.experts) * (1 - min(1.0, self.router.computing_per_token / self.num_experts))

    def num_plans(self, modalities: Collection[Modality]) -> int:
        """One."""
        return 1

    def _limit(self, plan: PairPlan) -> PairPlan:
        """Apply the capacity; free experts have none."""
        if self.capacity is None:
            return plan
        if self.free is None:
            return apply_capacity(plan, self.capacity, self.training, self.factor_in_force)
        others = leave_out_free(plan, self.free.num_free)
        limited = apply_capacity(others, self.capacity, self.training, self.factor_in_force)
        free_N = plan.kept_N & ~others.kept_N
        return plan._replace(kept_N=limited.kept_N | free_N, capacity_T=limited.capacity_T)

    def _compute(self, plan: RoutingPlan, tokens_TD: Tensor) -> Tensor:
        if self.precision.dtype_of("experts") is None:
            return self._run(plan, tokens_TD)
        with region(self.precision, "experts", tokens_TD.device.type) as cast:
            return self._run(plan, cast(tokens_TD)).to(tokens_TD.dtype)

    def _run(self, plan: RoutingPlan, tokens_TD: Tensor) -> Tensor:
        experts = self._add_norm(self.experts, self.hidden_norm)
        if self.free is None:
            out_TD = self.dispatcher(plan, tokens_TD, experts)
        else:
            assert isinstance(plan, PairPlan), "checked by the router"
            out_TD = self.dispatcher(leave_out_free(plan, self.free.num_free), tokens_TD, experts)
            out_TD = out_TD + self.free(plan, tokens_TD)
        if self.shared is None:
            return out_TD
        shared_TD = run_everywhere(tokens_TD, self._add_norm(self.shared, self.shared_hidden_norm))
        return out_TD + torch.where(plan.valid_T.unsqueeze(-1), shared_TD, 0.0)

    def _add_norm(self, experts: ExpertStack, norm: nn.Module | None) -> Experts:
        return experts if norm is None else SubNormedExperts(experts, norm, self.precision)


def _kept_per_row(experts: ExpertStack) -> int:
    *inner, last = experts.stacks()
    return 2 * experts.dim + (len(inner) + 1) * last.shape[1]


def name_layers(backbone: nn.Module) -> None:
    """Give every MoE and attention layer its path in the backbone, for its records."""
    for path, module in backbone.named_modules():
        if isinstance(module, Mixture | Attention):
            module.path = path


def reads_identity(backbone: nn.Module) -> bool:
    """Say whether a router of the backbone reads token ids and patch codes."""
    return any(isinstance(module, Mixture) and module.router.reads_identity for module in backbone.modules())
