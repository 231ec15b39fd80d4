"""The router contract: tokens in, routing plan out."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput, RoutingPlan
from lightning_moevlm.model.initial_weights import Module
from lightning_moevlm.model.precision import Region
from lightning_moevlm.model.routers.gate import Gate


class ExpertAxis(NamedTuple):
    """A tensor of a router and which of its axes is the experts."""

    tensor: Tensor
    axis: int


class Router(Module):
    """Turns tokens into a plan.

    A router's first two constructor arguments are `dim` (D) and `num_experts` (E). The plan's logits and probabilities
    are fp32, padding (`valid_T` False) is never chosen, and evaluation is deterministic. Nothing is counted in
    `forward`, because activation checkpointing runs it twice.

    competes: tokens compete across positions, so a token's experts depend on later tokens; causal models refuse it.
    crosses_samples: in evaluation, too, a token's experts depend on the other samples of its batch, so features and
        metrics depend on the batch size.
    choices_vary: the number of experts differs between tokens. Capacity counts choices, so in a causal model an early
        token would depend on how many experts later ones take.
    never_starves: every expert always has the same work, so none can be dead.
    reads_identity: needs token ids and patch codes (`RoutingInput.identity_T`), which models compute only for it.
    adds_noise: its plans of training steps carry noisy logits and the noise's std.
    takes_choices: it weighs experts that were chosen elsewhere (`RoutingInput.expert_TK`) by its own scores.
    mixes: its plans are `MixPlan`s: slots of mixed tokens, without choices.
    tally_size: number of counts that `rebalance` needs beside the loads, see `tally`.
    num_free: number of its experts, the last ones, that compute nothing, see `set_free`.
    keeps_dtype: computes in a dtype of its own, which no precision policy changes.
    has_logits: its logits are those that it chooses by; False: logarithms of its probabilities stand in for them.
    """

    competes = False
    crosses_samples = False
    choices_vary = False
    never_starves = False
    reads_identity = False
    adds_noise = False
    takes_choices = False
    mixes = False
    tally_size = 0
    num_free = 0
    keeps_dtype = False
    has_logits = True
    region: Region = "router"

    def __init__(self, dim: int, num_experts: int, gate: Gate = Gate()) -> None:
        super().__init__()
        self.dim = dim
        self.num_experts = num_experts
        self.gate = gate

    @property
    def initial_std(self) -> float | None:
        """Standard deviation of the initial weights; None takes the model's."""
        return self.gate.initial_std

    @abstractmethod
    def forward(self, inputs: RoutingInput) -> RoutingPlan:
        """Route T tokens."""

    @property
    @abstractmethod
    def experts_per_token(self) -> float:
        """Experts that run for one token on average; active parameters are counted with it."""

    @property
    def computing_per_token(self) -> float:
        """Experts that compute for one token on average: all that it uses, but the free ones at even loads."""
        return self.experts_per_token * (1 - self.num_free / self.num_experts)

    def expert_rows(self, num_tokens: int) -> float:
        """Return how many rows all experts run together for a sequence of so many tokens, on average."""
        return self.computing_per_token * num_tokens

    def set_free(self, num_free: int) -> None:
        """Learn that the last experts compute nothing (`model.experts.FreeExperts`); 0 are free without them.

        Raises:
            UserError: a router for which no expert can be free.
        """
        if num_free and self.mixes:
            raise UserError(
                f"moe.free adds experts that tokens may choose, and {type(self).__name__} mixes tokens and chooses "
                "none: set moe.free to null, or choose another router, such as TopKRouter"
            )
        self.num_free = num_free

    def forward_flops_per_token(self) -> int:
        """Matrix FLOPs of the routing itself for one token: 0 without learned scores."""
        return 0

    def per_expert(self) -> tuple[ExpertAxis, ...]:
        """Return the parameters and buffers with an axis of experts, found by the axes at the end of their names.

        To replace an expert, replace its slice of each.
        """
        named = (*self.named_parameters(), *self.named_buffers())
        axes = [(tensor, name.rpartition("_")[2]) for name, tensor in named]
        return tuple(ExpertAxis(tensor, axis.index("E")) for tensor, axis in axes if axis.isupper() and "E" in axis)

    def rows(self) -> Tensor | None:
        """Return the vectors that tokens are scored against, one per expert or slot, with gradient, or None.

        The default finds a parameter named `weight_ED`.
        """
        return self._parameters.get("weight_ED")

    def tally(self, plan: PairPlan) -> Tensor:
        """Return what `rebalance` needs of a plan beside its loads: int64 (tally_size), summed as the loads are.

        Called outside of `forward`, which activation checkpointing runs twice, with the state that the plan was made
        with. Most routers need nothing.
        """
        return plan.expert_N.new_zeros(self.tally_size)

    def rebalance(self, load_AE: Tensor, tally: Tensor) -> None:
        """Adapt routing state once per optimiser step. Most routers have none.

        load_AE: chosen pairs of each modality at each expert, summed over forward passes, ranks and accumulation;
            int64.
        tally: the same sum of `tally`, int64 (tally_size).
        """


class LinearRouter(Router):
    """A router that scores tokens against one learned row per expert, `weight_ED`.

    top_k: experts per token; a router whose number varies overrides `experts_per_token`.
    """

    top_k: int

    def __init__(self, dim: int, num_experts: int, gate: Gate = Gate()) -> None:
        super().__init__(dim, num_experts, gate)
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward_flops_per_token(self) -> int:
        """2 D E."""
        return 2 * self.dim * self.num_experts
