"""A mixture of experts as its readers see it: losses, telemetry, actions, receipts.

`MoEFFN` is a whole feed-forward. A layer that stands in a model of another code base may route alone, and leave the
experts to their block (`backbones/adopted/routing/`). Readers need no more than what is here.
"""

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from lightning_moevlm.contracts.routing_plan import RoutingInput
from lightning_moevlm.model.dispatch import Capacity, DispatchRecord
from lightning_moevlm.model.experts import ExpertStack, ExpertWeights, FreeExperts
from lightning_moevlm.model.initial_weights import Module
from lightning_moevlm.model.precision import PrecisionPolicy
from lightning_moevlm.model.routers import Router


class Mixture(Module):
    """A router beside its experts; a forward pass makes one plan.

    dim: width D of its tokens.
    num_experts: E, those with weights.
    experts: their weights.
    dispatcher: describes the way in which they run.
    capacity: null is dropless.
    factor_in_force: the capacity factor of the current step, if it changes.
    choose: experts (T, K) in training; None lets the router choose.
    free, shared: experts beside them, see `MoEFFN`.
    hidden_norm, shared_hidden_norm: before the last matrix of experts.
    path: in the backbone, see `name_layers`.
    """

    precision = PrecisionPolicy()
    dim: int
    num_experts: int
    router: Router
    experts: ExpertWeights
    dispatcher: DispatchRecord
    capacity: Capacity | None
    factor_in_force: Tensor | None
    choose: Callable[[RoutingInput], Tensor] | None
    free: FreeExperts | None
    shared: ExpertStack | None
    hidden_norm: nn.Module | None
    shared_hidden_norm: nn.Module | None
    path: str

    @abstractmethod
    def idle_parameters(self) -> float:
        """Return how many parameters of experts a token does not visit."""
