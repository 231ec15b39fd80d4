"""The dispatch contract."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import MixPlan, PairPlan, RoutingPlan
from lightning_moevlm.model.dispatch.capacity import Capacity
from lightning_moevlm.model.dispatch.expert_protocol import Experts
from lightning_moevlm.model.dispatch.soft_slots import run_slots


class DispatchRecord:
    """What a run records of the way in which experts run."""

    def record(self) -> str:
        """Describe the path that runs, for the record of a run."""
        return type(self).__name__

    def choices(self) -> dict[str, str]:
        """Return what was chosen for each case met so far; empty where the configuration alone decides."""
        return {}

    def in_use(self) -> tuple[str, ...]:
        """Return the class names of the dispatchers that have run, for one line on the terminal."""
        return (type(self).__name__,)


class Dispatcher(DispatchRecord, ABC):
    """Sends kept pairs through their experts and sums the weighted results per token.

    A token without a kept pair gets zeros: the residual connection around the layer carries it on.
    """

    def __call__(self, plan: RoutingPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        if isinstance(plan, MixPlan):
            return self.run_slots(plan, tokens_TD, experts)
        return self.run_pairs(plan, tokens_TD, experts)

    @abstractmethod
    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""

    def run_slots(self, plan: MixPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype. Slots are full by construction, so one stacked product serves all."""
        return run_slots(plan, tokens_TD, experts)

    def refusal(self, tokens_TD: Tensor, experts: Experts) -> str | None:
        """Return why this dispatcher cannot run such tokens and experts, with the remedy; None where it can."""
        return None

    def check(self, capacity: Capacity | None) -> None:
        """Refuse a capacity whose plans could not be run.

        Raises:
            UserError: with what to change.
        """


def matmul_dtype(tokens_TD: Tensor) -> torch.dtype:
    """Return the dtype that matrix products run in: autocast's where it is on, else the tokens'."""
    device_type = tokens_TD.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return tokens_TD.dtype
