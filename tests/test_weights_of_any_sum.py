"""Every reader of plans, on plans whose weights are no probabilities.

DeepSeek-V3 scales them by 2.5, and those of GPT-OSS are a softmax over the chosen alone. A loss or metric that takes
them for shares of a sum of 1, or for the probabilities, would be wrong on one of them.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_moevlm.atlas.causal.interventions import ExpertOff, FrozenChoices, OtherSample, WithoutBest, rank_experts
from lightning_moevlm.atlas.gallery.top_tokens import TopTokenKeeper
from lightning_moevlm.atlas.labels.label_tokens import TokenLabels
from lightning_moevlm.atlas.labels.words import Words
from lightning_moevlm.atlas.routing.confidence import ConfidenceMeter
from lightning_moevlm.atlas.routing.route import LayerChoices, PlacedPlan, RoutedBatch, choices_of
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.contracts.step_records import LossReport, NamedPlan, ObjectiveOutput, Term
from lightning_moevlm.model.backbones.adopted.audit.loads import measure_loads
from lightning_moevlm.model.dispatch import Capacity, ModalityFactors, apply_capacity
from lightning_moevlm.model.losses import LossInput
from lightning_moevlm.model.metrics.drop_rate import DropRates
from lightning_moevlm.model.metrics.routing_shift import chosen_experts, chosen_overlap, routing_shift
from lightning_moevlm.model.routers import QuantileUpdate, SigmoidBiasRouter
from lightning_moevlm.training.callbacks.recording.frozen_routing import find_rule, impose_choices
from lightning_moevlm.training.callbacks.recording.step_values import StepCollector
from lightning_moevlm.training.callbacks.telemetry import routing_values
from tests.model.losses.every_loss import LOSSES, first_matrices
from tests.routing import full_plan

FACTOR = 2.5
SAMPLES, PATCHES, LENGTH = 2, 4, 8
LOGITS = torch.randn(SAMPLES * LENGTH, 4, generator=torch.Generator().manual_seed(0))


def plan_of(weigh: Callable[[Tensor], Tensor], losing: bool = True) -> PairPlan:
    """Two samples of four patches and four words, two choices each. The last word is padding.

    losing: some choices are dropped.
    """
    valid_T = torch.arange(SAMPLES * LENGTH) % LENGTH < LENGTH - 1
    modality_T = torch.where(torch.arange(SAMPLES * LENGTH) % LENGTH < PATCHES, int(Modality.IMAGE), int(Modality.TEXT))
    plan = full_plan(LOGITS, valid_T=valid_T, top_k=2)._replace(modality_T=modality_T, num_sequences=SAMPLES)
    weight_KT = weigh(plan.weight_N.view(2, -1))
    plan = plan._replace(weight_N=weight_KT.flatten())
    return apply_capacity(plan, Capacity(train_factor=0.8, priority="token"), training=True) if losing else plan


def scaled(weight_KT: Tensor) -> Tensor:
    return FACTOR * weight_KT


def over_chosen(weight_KT: Tensor) -> Tensor:
    return weight_KT / weight_KT.sum(dim=0)


def test_the_plans_are_what_they_stand_for() -> None:
    plain, by_factor, of_chosen = (plan_of(each).weight_N.view(2, -1) for each in (lambda w: w, scaled, over_chosen))
    assert torch.equal(by_factor, 2.5 * plain)
    torch.testing.assert_close(of_chosen.sum(dim=0), torch.ones(16))
    assert bool((plain.sum(dim=0) < 0.99).all())
    assert 0 < int(plan_of(scaled).kept_N.sum()) < int(plan_of(scaled).chosen_N.sum())


def named(plan: PairPlan) -> NamedPlan:
    return NamedPlan("pair", 0, "layer", tuple(Modality), plan)


def loss_of(name: str, plan: PairPlan) -> Tensor:
    rows = LOGITS.t()
    inputs = LossInput(plan, rows, training=not LOSSES[name].draws, first_EDF=first_matrices(rows))
    value = LOSSES[name](inputs)
    assert isinstance(value, Tensor)
    return value


def record_step(plan: PairPlan) -> list[Tensor]:
    collector = StepCollector()
    loss = torch.zeros(())
    collector.add(
        {"loss": loss, "report": LossReport({"text": Term(loss, 1.0)}, {}), "plans": (named(plan),), "attention": (),
         "log_partitions": {}, "num_tokens": plan.num_tokens, "num_samples": SAMPLES}
    )  # fmt: skip
    return [values.values_V for values in collector.finish()]


def count_drops(plan: PairPlan) -> dict[Any, float]:
    rates = DropRates(["layer"])
    rates.update(cast(ObjectiveOutput, SimpleNamespace(plans=(named(plan),))))
    return rates.rates()


BATCH = Batch(
    torch.arange(SAMPLES * 3 * 4, dtype=torch.uint8).view(SAMPLES, 3, 2, 2), torch.zeros(SAMPLES, 4).long(),
    torch.ones(SAMPLES, 4).bool(), ("one", "other"), sources=("set",),
)  # fmt: skip
WORDS = Words(("a", "red", "cat", "sat"), (0, 1, 2, 3), ("a", "red", "cat", "sat"))
LABELS = TokenLabels(
    np.ones((SAMPLES, LENGTH), np.bool_), np.repeat([int(each) for each in Modality], 4).astype(np.int32), {}, {},
    (WORDS, WORDS),
)  # fmt: skip


def atlas_choices(plan: PairPlan) -> LayerChoices:
    reader = cast(Any, SimpleNamespace(grid=2, length=LENGTH))
    (layer,) = choices_of([PlacedPlan(named(plan), range(SAMPLES))], reader, BATCH)
    return layer


def routed(plan: PairPlan) -> RoutedBatch:
    probe = cast(Any, SimpleNamespace(batch=BATCH, source="set", texts=("", "")))
    return RoutedBatch(probe, LABELS, (atlas_choices(plan),))


def confidence(plan: PairPlan) -> Any:
    meter = ConfidenceMeter()
    meter.add(routed(plan))
    return meter.of_layer("layer")


def gallery(plan: PairPlan) -> list[Any]:
    keeper = TopTokenKeeper(PATCHES, seed=0)
    keeper.add(routed(plan))
    return [
        each
        for expert in range(4)
        for top in [keeper.of_expert("layer", expert)]
        for each in (*top.patches, *top.words)
    ]


def changed(plan: PairPlan) -> list[Tensor]:
    """Who is chosen after every intervention, and which choices are left."""
    inputs = RoutingInput(LOGITS, plan.modality_T, plan.valid_T, SAMPLES)
    changes = (ExpertOff(0), ExpertOff(1, to="nothing"), WithoutBest(), OtherSample(), FrozenChoices(plan))
    made = [change(plan, inputs) for change in changes]
    assert all(isinstance(each, PairPlan) for each in made)
    return [rank_experts(plan), *(value for each in made for value in (each.expert_N, each.chosen_N))]  # type: ignore[union-attr]


def frozen_weights(plan: PairPlan) -> Tensor:
    """What `FrozenRouting` weighs the same choices by."""
    rule = find_rule(plan, "Router")
    imposed = impose_choices(plan, plan, rule)
    return imposed.weight_N


def tally(plan: PairPlan) -> Tensor:
    return SigmoidBiasRouter(4, 4, top_k=2, update=QuantileUpdate(num_bins=8)).tally(plan)


def serve(priority: Any) -> Callable[[PairPlan], Tensor]:
    factors = ModalityFactors(image=0.5, text=0.9)
    return lambda plan: apply_capacity(plan, Capacity(factors, priority=priority), training=True).kept_N


ON_WEIGHTS = ("relu_l1", "relu_l1, not by load")
OTHERS = ("output_z", *ON_WEIGHTS)
"""Losses that read weights, or no plans."""

READERS: dict[str, Callable[[PairPlan], Any]] = {
    **{f"loss {name}": lambda plan, name=name: loss_of(name, plan) for name in LOSSES if name not in OTHERS},
    "telemetry": lambda plan: routing_values([named(plan)]),
    "audit": lambda plan: measure_loads([[named(plan)]]),
    "flight recorder": record_step,
    "drop rates in evaluation": count_drops,
    "loads": lambda plan: (plan.chosen_loads(), plan.kept_loads(plan.modality_T, 2)),
    "flips": lambda plan: routing_shift([plan], [plan_of(lambda w: w)]),
    "saturation": lambda plan: chosen_overlap(chosen_experts(plan)[plan.valid_T], LOGITS[plan.valid_T] > -0.5),
    "tally of routers": tally,
    "interventions": changed,
    "atlas, choices": lambda plan: (lambda each: (each.seen_BS, each.chosen_BSE, each.probs_BSE))(atlas_choices(plan)),
    "atlas, confidence": lambda plan: (confidence(plan).of_modality, confidence(plan).pairs_E),
    "capacity by position": serve("position"),
    "capacity by token": serve("token"),
}
"""What reads choices, logits and probabilities, and not weights."""

ORDERED: dict[str, Callable[[PairPlan], Any]] = {
    "capacity by probability": serve("probability"),
    "capacity by gate": serve("gate"),
    "gallery": lambda plan: [each[1:] for each in gallery(plan)],
}
"""What asks which weights are larger."""

PROPORTIONAL: dict[str, Callable[[PairPlan], Any]] = {
    **{f"loss {name}": lambda plan, name=name: loss_of(name, plan) for name in ON_WEIGHTS},
    "frozen routing": frozen_weights,
    "atlas, weights": lambda plan: atlas_choices(plan).weight_BSE,
    "atlas, mean weight of an expert": lambda plan: confidence(plan).weight_E,
    "weights in the gallery": lambda plan: [each.weight for each in gallery(plan)],
}
"""What is proportional to the weights, by its definition."""


def numbers(found: Any) -> Iterator[Any]:
    """Yield what can be compared."""
    if isinstance(found, Tensor):
        yield from found.flatten().tolist()
    elif isinstance(found, dict):
        yield from (each for key, value in found.items() for each in (key, *numbers(value)))
    elif isinstance(found, list | tuple):
        yield from (each for one in found for each in numbers(one))
    else:
        yield found


@pytest.mark.parametrize("name", READERS)
def test_weights_are_not_read(name: str) -> None:
    expected = list(numbers(READERS[name](plan_of(lambda w: w))))
    assert expected
    for weigh in (scaled, over_chosen):
        assert list(numbers(READERS[name](plan_of(weigh)))) == expected


@pytest.mark.parametrize("name", ORDERED)
def test_a_factor_changes_no_order(name: str) -> None:
    expected = list(numbers(ORDERED[name](plan_of(lambda w: w, losing=False))))
    assert list(numbers(ORDERED[name](plan_of(scaled, losing=False)))) == expected
    assert list(numbers(ORDERED[name](plan_of(lambda w: 1 - w, losing=False)))) != expected


@pytest.mark.parametrize("name", PROPORTIONAL)
def test_a_factor_is_kept(name: str) -> None:
    plain, other = (list(numbers(PROPORTIONAL[name](plan_of(weigh)))) for weigh in (lambda w: w, scaled))
    assert any(plain)
    assert other == pytest.approx([FACTOR * each for each in plain], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weigh", [lambda w: w, scaled, over_chosen, lambda w: FACTOR * over_chosen(w)])
def test_frozen_routing_weighs_as_the_router_does(weigh: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Also where the router gives its weights in a narrow format; they are rounded to it again afterwards."""
    plan = plan_of(weigh)
    plan = plan._replace(weight_N=plan.weight_N.to(dtype).float())
    found_N = frozen_weights(plan)
    assert torch.allclose(
        found_N[plan.chosen_N].to(dtype).float(),
        plan.weight_N[plan.chosen_N],
        rtol=1e-6 if dtype == torch.float32 else 1e-2,
    )
