"""A mixture of ours in the place of a dense feed-forward of transformers.

their block:  hidden -> feed-forward -> hidden
here:         hidden -> router -> plan -> experts that were made of the feed-forward -> hidden
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.model.backbones.adopted.routing.current_pass import CurrentPass
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_experts import UpcycledExperts
from lightning_moevlm.model.backbones.adopted.upcycling.dense import Dense, activation_of, read_weights
from lightning_moevlm.model.dispatch import Capacity, Dispatcher
from lightning_moevlm.model.dispatch.loop import LoopDispatcher
from lightning_moevlm.model.experts.upcycle import Upcycle, make_biases, make_experts
from lightning_moevlm.model.initial_weights import derive_seed, initialise
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.layers.feed_forward.feed_forward import RoutedPlan
from lightning_moevlm.model.routers import Router

_NUM_TRIALS = 64
_HIDDEN_AXIS = {"gate": 1, "up": 1, "down": 0}


class UpcycledMoE(MoEFFN):
    """Stands where a dense feed-forward stood.

    The last matrix of each expert is scaled so that a token's experts weigh 1 together, on average over random tokens
    if the router does not keep their sum constant. With slices, the router's rows are equal for all slices of a copy,
    so that they are chosen together at first.

    Args:
        dense: where it stood and what it computes.
        theirs: the feed-forward.
        current: what the running pass is about.
        num_experts: E, slices counted one by one.
        num_slices: G, of each copy.
        router: factory (dim, num_experts) -> Router.
        options: noise and new units.
        capacity: of experts; None is dropless.
        dispatcher: None is AutoDispatcher.

    Raises:
        UserError: slices that do not divide, or a router that makes no plan of pairs or reads more than tokens.
    """

    keeps_weights = True  # see `initialise`; `start` draws them
    modality: Modality | None = None  # it gets the tokens of all

    def __init__(
        self,
        dense: Dense,
        theirs: nn.Module,
        current: CurrentPass,
        num_experts: int,
        num_slices: int,
        router: Callable[[int, int], Router],
        options: Upcycle,
        capacity: Capacity | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        if num_experts % num_slices or dense.hidden_dim % num_slices:
            raise UserError(
                f"model.backbone.upcycle.granularity {num_slices} does not divide num_experts {num_experts} and the "
                f"{dense.hidden_dim} hidden units of {dense.path}: choose a divisor of both"
            )
        weights = read_weights(theirs, dense.form)
        make = partial(
            UpcycledExperts,
            hidden_dim=dense.hidden_dim // num_slices,
            parts=frozenset(weights),
            function=activation_of(theirs, dense.form),
            dtype=weights["down"].dtype,
        )
        super().__init__(dense.dim, num_experts, router, make, capacity, dispatcher)
        self._refuse_router()
        self.replaced: tuple[nn.Module, ...] = (theirs,)  # in a tuple: not a part any more
        self.dense, self.current, self.num_slices, self.options = dense, current, num_slices, options

    def forward(self, hidden: Tensor, *more: Any, **named: Any) -> Tensor:  # type: ignore[override]
        """Route the tokens and run their experts; the plan is at the result's `plans`."""
        tokens_TD = hidden.reshape(-1, hidden.shape[-1])
        plan = self.route(self.current.place(tokens_TD, None).inputs)
        out: Any = self._compute(plan, tokens_TD).view(hidden.shape)
        routed = RoutedPlan(self.path, self.current.tokens.modalities, plan)
        self.current.record(routed)
        out.plans = (routed,)
        return out

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Draw the router, and make the experts of the feed-forward, if that is still there."""
        initialise(self.router, derive_seed(seed, self.path))
        rows = self.router.rows()
        if rows is not None and self.num_slices > 1:
            rows.copy_(rows[:: self.num_slices].repeat_interleave(self.num_slices, dim=0))
        if not self.replaced:
            return
        weights = read_weights(self.replaced[0], self.dense.form)
        scale = self.num_slices / self._mean_sum()
        assert isinstance(self.experts, UpcycledExperts)
        for part, stack in self.experts.parts().items():
            scaled = weights[part].float() * scale if part.startswith("down") else weights[part]
            matrix = part.removesuffix("_bias")
            axis = _HIDDEN_AXIS[matrix]
            if matrix == part:
                made = make_experts(
                    scaled, self.num_experts, axis, self.options, self.path, f"experts.{part}", self.num_slices
                )
            else:
                made = make_biases(scaled, self.num_experts, bool(axis), self.num_slices)
            stack.copy_(made)
        self.start_difference = self._measure()

    def forget_dense(self) -> None:
        """Free the feed-forward."""
        self.replaced = ()

    def _refuse_router(self) -> None:
        name = type(self.router).__name__
        if self.router.mixes:
            raise UserError(f"model.backbone.router {name} mixes tokens and chooses no experts: choose TopKRouter")
        if self.router.reads_identity:
            raise UserError(
                f"model.backbone.router {name} reads token ids, which upcycled models do not pass: choose another"
            )

    @torch.no_grad()
    def _trial(self) -> PairPlan:
        """Return the plan of random tokens, in evaluation."""
        rows = self.router.rows()
        device = self.experts.stacks()[0].device if rows is None else rows.device
        text_T = torch.full((_NUM_TRIALS,), int(Modality.TEXT), device=device)
        valid_T = torch.ones_like(text_T, dtype=torch.bool)
        was_training = self.router.training
        plan = self.router.eval()(RoutingInput(self._tokens().to(device), text_T, valid_T))
        self.router.train(was_training)
        assert isinstance(plan, PairPlan), "it mixes nothing"
        return plan

    def _tokens(self) -> Tensor:
        sample = torch.Generator("cpu").manual_seed(0)
        return torch.randn(_NUM_TRIALS, self.dim, generator=sample, device="cpu")

    def _mean_sum(self) -> float:
        plan = self._trial()
        return float(torch.where(plan.chosen_N, plan.weight_N, 0.0).sum() / _NUM_TRIALS)

    def _measure(self) -> float:
        """Return the largest difference to the feed-forward over its largest output, of random tokens."""
        (theirs,) = self.replaced
        tokens_TD = self._tokens().to(self.experts.stacks()[0])
        mixed_TD = LoopDispatcher().run_pairs(self._trial(), tokens_TD, self.experts)
        was_training = theirs.training
        alone_TD = theirs.eval()(tokens_TD.unsqueeze(0))[0]
        theirs.train(was_training)
        return float((mixed_TD - alone_TD).abs().max() / alone_TD.abs().max().clamp(min=1e-30))
