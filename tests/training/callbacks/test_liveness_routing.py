"""Switches of the routing prove that they act; a router or a layer that does not use one is named."""

from functools import partial
from typing import Any

import pytest

from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.experts import FreeExperts
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.routers import CosineRouter, Gate, LongTailRouter, SequenceTopKRouter, TopKRouter
from lightning_moevlm.training import Actions
from lightning_moevlm.training.actions import ReviveDeadExperts
from lightning_moevlm.training.callbacks.liveness.rehearsal import replace_attribute
from tests.training.callbacks.asked_run import asked, module_of, refused

GATES = {
    "jitter": Gate(jitter=0.01),
    "dropout": Gate(dropout=0.1),
    "temperature": Gate(temperature=2.0),
}


@pytest.mark.parametrize("name", GATES)
def test_switches_of_a_gate_are_alive(name: str) -> None:
    receipts, points = asked(module_of(router=partial(TopKRouter, gate=GATES[name])))
    assert receipts[f"gate.{name}"].startswith("alive: without it the logits of each of "), receipts
    assert [switch for switch in receipts if switch.startswith(("gate.", "moe."))] == [f"gate.{name}"]
    assert points[f"liveness/gate.{name}"][0][1] > 0


def test_temperature_of_two_is_half_of_the_logits() -> None:
    # half the logits against whole ones: |l / 2 - l| / |l / 2| = 1
    _, points = asked(module_of(router=partial(TopKRouter, gate=Gate(temperature=2.0))))
    assert points["liveness/gate.temperature"][0][1] == pytest.approx(1.0)
    both, _ = asked(module_of(router=partial(CosineRouter, gate=Gate(jitter=0.01, temperature=0.07))))
    assert {switch for switch in both if switch.startswith("gate.")} == {"gate.jitter", "gate.temperature"}


class IgnoresGate(TopKRouter):
    """Has a gate, and scores without it."""

    def forward(self, inputs: Any) -> Any:
        with replace_attribute(self, "gate", Gate()):
            return super().forward(inputs)


@pytest.mark.parametrize("name", GATES)
def test_a_router_that_does_not_use_its_gate_is_dead(name: str) -> None:
    module = module_of(router=partial(IgnoresGate, gate=GATES[name]))
    refused(module, f"gate.{name}", f".router gives the same logits without its gate.{name}")


def test_choices_that_vary_are_counted() -> None:
    # two of four experts on average; capped at one, every token takes one and nothing varies
    free, points = asked(module_of(router=SequenceTopKRouter))
    assert free["router.choices"].startswith("alive: tokens use ") and ", 2.00 on average" in free["router.choices"]
    assert points["liveness/router.choices"] == [(0, pytest.approx(2.0))]
    fixed, _ = asked(module_of(router=partial(SequenceTopKRouter, top_k=1, max_k=1)))
    assert fixed["router.choices"].startswith("idle: tokens use 1 to 1 experts")
    tail, _ = asked(module_of(router=LongTailRouter))
    assert tail["router.choices"].startswith("alive: tokens use 2 to 4 experts")
    assert "router.choices" not in asked(module_of(router=TopKRouter))[0]


def test_free_experts_get_their_share() -> None:
    actions = Actions(revive_dead_experts=ReviveDeadExperts())
    module = module_of(router=partial(TopKRouter, top_k=2), free=FreeExperts, actions=actions)
    receipts, points = asked(module)
    assert receipts["moe.free"].startswith("alive: ")
    assert " choices of 2 layers go to free experts" in receipts["moe.free"]
    assert 0 < points["liveness/moe.free"][0][1] < 1
    assert " of 8 experts have no token here" in receipts["actions.revive_dead_experts"]  # free ones are none of them


def test_a_capacity_leaves_pairs_out_or_could() -> None:
    tight, _ = asked(module_of(capacity=Capacity(train_factor=0.25)))
    assert tight["moe.capacity"].startswith("alive: it drops ")
    wide, points = asked(module_of(capacity=Capacity(train_factor=4.0)))  # each of 4 experts has room for all
    assert wide["moe.capacity"].startswith("idle: it drops 0 of ")
    assert points["liveness/moe.capacity"][0][1] == 0
    dropless, _ = asked(module_of(capacity=Capacity(train_factor=None)))
    assert "moe.capacity" not in dropless


class IgnoresCapacity(MoEFFN):
    """Has a capacity, and runs every pair."""

    def forward(self, *args: Any) -> Any:
        with replace_attribute(self, "capacity", None):
            return super().forward(*args)


def test_a_layer_that_does_not_use_its_capacity_is_dead() -> None:
    module = module_of(capacity=Capacity())
    for layer in module.backbone.modules():
        if isinstance(layer, MoEFFN):
            layer.__class__ = IgnoresCapacity
    refused(module, "moe.capacity", "keeps every pair under a capacity of one place per expert")
