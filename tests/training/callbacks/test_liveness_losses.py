"""Auxiliary losses prove that they act; each way of being dead is named."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.contracts.step_records import PlanSize, Term
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.losses import (
    AuxiliaryLosses,
    ByOverflow,
    ExpertCoupling,
    GlobalEntropy,
    Importance,
    Load,
    LoadBalance,
    LossInput,
    MutualInformation,
    OutputZ,
    PlanLoss,
    ReLUL1,
    RouterOrthogonality,
    RouterZ,
)
from lightning_moevlm.model.routers import FixedRouter, NoisyTopKRouter, ReLURouter, TopKRouter
from lightning_moevlm.training import Actions, VisionLanguageModule
from lightning_moevlm.training.actions import FreezeRouter
from lightning_moevlm.training.optim import GroupOptions
from tests.routing import loss_of
from tests.small_model import small_vl_moe
from tests.training.callbacks.asked_run import asked, module_of, refused


@pytest.mark.parametrize(
    ("losses", "router"),
    [
        (AuxiliaryLosses(LoadBalance(), RouterZ()), None),
        (AuxiliaryLosses(LoadBalance(scope="global", per_modality=True), None, output_z=OutputZ()), None),
        (AuxiliaryLosses(None, None, load=Load(), importance=Importance()), NoisyTopKRouter),
        (AuxiliaryLosses(LoadBalance(ByOverflow(0.1)), router_orthogonality=RouterOrthogonality()), None),
        (AuxiliaryLosses(None, None, relu_l1=ReLUL1()), ReLURouter),
        (AuxiliaryLosses(LoadBalance(only="text"), None, expert_coupling=ExpertCoupling()), None),
        (AuxiliaryLosses(None, None, global_entropy=GlobalEntropy(), mutual_information=MutualInformation()), None),
    ],
)
def test_losses_are_alive(losses: AuxiliaryLosses, router: Callable[[int, int], Any] | None) -> None:
    receipts, points = asked(module_of(losses, router), steps=2)
    for name in losses.weights:
        assert receipts[f"losses.{name}"].startswith("alive: gradient norm "), receipts
        assert receipts[f"losses.{name}"].endswith("(step 1)")
        assert [step for step, value in points[metric_keys.LIVENESS.key(switch=f"losses.{name}")] if value > 0] == [
            0,
            1,
        ]


@dataclass(frozen=True)
class StandIn(PlanLoss):
    """The options of LoadBalance, without inheritance: subclasses could be named in a configuration."""

    weight: Any = 1e-2
    scope: Any = "micro_batch"
    per_modality: bool = False

    def sums(self, inputs: LossInput) -> Tensor:
        return self(inputs)  # type: ignore[return-value]

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        return sums


@dataclass(frozen=True)
class Detached(StandIn):
    """A balance loss of detached probabilities, as in NeMo Automodel 1408 and FuseMoE 6."""

    def __call__(self, inputs: LossInput) -> Tensor:
        return loss_of(LoadBalance(), inputs.plan.detach()).requires_grad_()


@dataclass(frozen=True)
class Constant(StandIn):
    """Each expert's probability times the mean load, as in hyper-parallel 752: their sum is always 1."""

    def __call__(self, inputs: LossInput) -> Tensor:
        return inputs.plan.probs_TE.sum(dim=1).mean()


@dataclass(frozen=True)
class Leaking(StandIn):
    """Reaches the given tensors."""

    weights: tuple[Tensor, ...] = ()

    def __call__(self, inputs: LossInput) -> Tensor:
        return loss_of(LoadBalance(), inputs.plan) + sum(weight.square().sum() for weight in self.weights)


@dataclass(frozen=True)
class GrowsWithCounts(StandIn):
    """Grows with ranks and micro-batches, as in Megatron-LM 3672 and NeMo Automodel 3359."""

    scope: Any = "global"

    def __call__(self, inputs: LossInput) -> Tensor:
        assert inputs.counts is not None
        return loss_of(LoadBalance(), inputs.plan) * inputs.counts.token_A.sum()


def test_a_loss_of_detached_values_is_dead() -> None:
    refused(
        module_of(AuxiliaryLosses(Detached(), RouterZ())),
        "losses.load_balance",
        "detached",
        "model.losses.load_balance",
    )


def test_a_constant_loss_is_dead() -> None:
    refused(module_of(AuxiliaryLosses(Constant(), None)), "losses.load_balance", "constant", "pushed out of balance")


def test_a_loss_that_reaches_experts_is_dead() -> None:
    module = module_of()
    layer = [layer for layer in module.backbone.modules() if isinstance(layer, MoEFFN)][-1]
    module = VisionLanguageModule(
        module.backbone, losses=AuxiliaryLosses(Leaking(weights=layer.experts.stacks()), None)
    )
    refused(module, "losses.load_balance", "on experts of the last sparse block")


def test_a_loss_that_grows_with_layers_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = AuxiliaryLosses.terms

    def summed(losses: AuxiliaryLosses, inputs: Sequence[LossInput], *args: Any, **kwargs: Any) -> dict[str, Term]:
        """As in transformers 28255 and OLMoE 45."""
        terms = mean(losses, inputs, *args, **kwargs)
        return {name: Term(term.raw * len(inputs), term.weight) for name, term in terms.items()}

    monkeypatch.setattr(AuxiliaryLosses, "terms", summed)
    refused(module_of(AuxiliaryLosses(LoadBalance(), None)), "losses.load_balance", "every layer counted twice")


def test_a_loss_that_grows_with_ranks_and_micro_batches_is_dead() -> None:
    refused(module_of(AuxiliaryLosses(GrowsWithCounts(), None)), "losses.load_balance", "the counts of two equal ranks")


def test_a_loss_too_weak_to_change_a_bit_is_dead() -> None:
    refused(
        module_of(AuxiliaryLosses(LoadBalance(1e-30), None)), "losses.load_balance", "the step is the same without it"
    )


def without_routers(groups: Iterable[Any], learning_rate: float = 1e-3) -> Optimizer:
    return SGD([group for group in groups if group["role"] != "router"], lr=learning_rate)


def test_a_weight_that_no_optimiser_owns_is_reported() -> None:
    module = module_of(AuxiliaryLosses(LoadBalance(), None), optimizer=without_routers)
    refused(module, "losses.load_balance", "no optimiser trains router weights")


def test_a_balance_loss_on_frozen_routers_is_dead() -> None:
    module = module_of(AuxiliaryLosses(LoadBalance(), None))
    for layer in module.backbone.modules():
        if isinstance(layer, MoEFFN):
            layer.router.requires_grad_(False)
    refused(module, "losses.load_balance", "router weights are frozen")
    multiplied = module_of(AuxiliaryLosses(LoadBalance(), None), groups=GroupOptions(router_lr_multiplier=0.0))
    refused(multiplied, "losses.load_balance", "learning rate 0")


def test_a_loss_on_a_router_that_learns_nothing_is_dead() -> None:
    refused(
        module_of(AuxiliaryLosses(LoadBalance(), None), FixedRouter), "losses.load_balance", "the router has no weights"
    )


def test_a_loss_that_is_off_by_weight_or_schedule_is_not_dead() -> None:
    losses = AuxiliaryLosses(LoadBalance(Ramp(0.0, 0.01, 2, begin=1)), RouterZ(0.0))
    receipts, _ = asked(module_of(losses), steps=1)
    assert receipts == {
        "losses.load_balance": "off: its weight is 0 at this step (step 0)",
        "losses.router_z": "off: its weight is 0 (step 0)",
    } | {name: text for name, text in receipts.items() if not name.startswith("losses.")}
    receipts, _ = asked(module_of(losses), steps=3)  # at step 2 half of the ramp is done
    assert receipts["losses.load_balance"].startswith("alive: ")
    frozen = module_of(AuxiliaryLosses(), actions=Actions(freeze_router=FreezeRouter(1)))
    receipts, _ = asked(frozen, steps=3)
    assert receipts["losses.load_balance"] == "off: actions.freeze_router keeps routers still after step 1 (step 2)"
    dense = VisionLanguageModule(small_vl_moe(sparse_modalities=()))
    receipts, points = asked(dense)
    assert receipts["losses.load_balance"] == "off: a dense model has no routers (step 0)"
    assert not any(key.startswith("balance_gradient_share") for key in points)


def test_a_loss_at_its_minimum_is_idle() -> None:
    module = module_of(AuxiliaryLosses(None, None, importance=Importance()))
    for layer in module.backbone.modules():
        if isinstance(layer, MoEFFN):
            nn.init.zeros_(layer.router.weight_ED)  # all experts alike: CV = 0, and so is its gradient
    receipts, _ = asked(module)
    assert receipts["losses.importance"].startswith("idle: no gradient on router weights here")


class TurnRouter(TopKRouter):
    """Tokens choose experts in turn, so that loads are equal."""

    def forward(self, inputs: RoutingInput) -> PairPlan:
        plan = super().forward(inputs)
        expert_N = (plan.token_N + torch.arange(len(plan.token_N)) // plan.num_tokens) % plan.num_experts
        return plan._replace(expert_N=expert_N, weight_N=plan.probs_TE[plan.token_N, expert_N])


@pytest.mark.parametrize("scope", ["micro_batch", "global"])
def test_equal_loads_are_idle_and_dead_if_they_can_be_no_others(scope: Any) -> None:
    """Equal loads times probabilities add up to the same for all probabilities."""

    def module(top_k: int) -> VisionLanguageModule:
        backbone = small_vl_moe(router=partial(TurnRouter, top_k=top_k), num_experts=4, sparse_modalities=("image",))
        return VisionLanguageModule(backbone, losses=AuxiliaryLosses(LoadBalance(scope=scope), None))

    assert asked(module(2))[0]["losses.load_balance"].startswith("idle: no gradient on router weights here; a plan")
    refused(module(4), "losses.load_balance", "it is constant")


def test_a_loss_on_a_router_that_training_has_saturated_is_idle() -> None:
    """At rates that are too high routers end there; that is how the run went, and no switch that cannot act."""
    module = module_of(AuxiliaryLosses(LoadBalance(), None, importance=Importance()))
    with torch.no_grad():
        for layer in module.backbone.modules():
            if isinstance(layer, MoEFFN):
                layer.router.weight_ED.mul_(1e6)
    receipts, _ = asked(module)
    for name in ("load_balance", "importance"):
        assert receipts[f"losses.{name}"].startswith("idle: no gradient on router weights here; a plan pushed")


def test_a_coupling_that_all_experts_fulfil_is_idle() -> None:
    """Each expert answers to its own row alone, and rows are as long as a router's rate a hundredfold makes them."""
    module = module_of(AuxiliaryLosses(None, None, expert_coupling=ExpertCoupling()))
    with torch.no_grad():
        for layer in module.backbone.modules():
            if isinstance(layer, MoEFFN):
                own = torch.eye(*layer.router.weight_ED.shape)
                layer.router.weight_ED.copy_(100 * own)
                first_EDF = layer.experts.stacks()[0]
                first_EDF.copy_(own.unsqueeze(-1).expand_as(first_EDF))
    receipts, _ = asked(module)
    assert receipts["losses.expert_coupling"].startswith("idle: no gradient on router weights here; a plan pushed")
