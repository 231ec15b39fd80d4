"""Routing shift by hand."""

import math

import pytest
import torch

from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.metrics import routing_shift
from lightning_moevlm.model.routers import TopKRouter
from tests.routing import routing_input, top_1_plan


def test_by_hand() -> None:
    # four tokens, the last is padding; of three the second changes its expert
    ours = top_1_plan(torch.tensor([[2.0, 0], [1.0, 3], [0, 1.0], [9.0, 0]]), valid_T=torch.arange(4) < 3)
    theirs = top_1_plan(torch.tensor([[2.0, 0], [4.0, 3], [0, 1.5], [0, 9.0]]), valid_T=torch.arange(4) < 3)
    shift = routing_shift([ours], [theirs], Modality.IMAGE)
    assert float(shift.flip_rate) == pytest.approx(1 / 3)
    assert float(shift.logit_error_max) == 3.0
    # (9 + 0.25) / (3 tokens x 2 experts)
    assert float(shift.logit_error_rms) == pytest.approx(math.sqrt(9.25 / 6))
    none = routing_shift([ours], [theirs], Modality.TEXT)
    assert [float(value) for value in none] == [0.0, 0.0, 0.0]
    assert float(routing_shift([ours], [theirs]).flip_rate) == pytest.approx(1 / 3)


def test_the_order_of_choices_is_no_flip() -> None:
    # 0.1 and 0.2 change places among the top 2 of three: the set stays
    router = TopKRouter(3, 3, top_k=2)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(3))

    def plan(*logits: float) -> PairPlan:
        return router(routing_input(1, 3)._replace(tokens_TD=torch.tensor([logits])))

    assert float(routing_shift([plan(0.1, 0.2, -5)], [plan(0.2, 0.1, -5)]).flip_rate) == 0.0
    assert float(routing_shift([plan(0.1, 0.2, -5)], [plan(0.1, -5, 0.2)]).flip_rate) == 1.0


def test_a_plan_does_not_differ_from_itself() -> None:
    router = TopKRouter(16, 8, top_k=2)
    initialise(router, seed=0, std=0.5)
    plan = router(routing_input(40, 16, num_padding=7))
    assert [float(value) for value in routing_shift([plan], [plan])] == [0.0, 0.0, 0.0]


def test_forward_passes_of_a_layer_count_by_their_tokens() -> None:
    # 1 of 2 tokens and 0 of 6: 1 of 8
    ours = [top_1_plan(torch.tensor([[2.0, 0], [1.0, 3]])), top_1_plan(torch.zeros(6, 2))]
    theirs = [top_1_plan(torch.tensor([[2.0, 0], [4.0, 3]])), top_1_plan(torch.zeros(6, 2))]
    shift = routing_shift(ours, theirs, Modality.IMAGE)
    assert float(shift.flip_rate) == pytest.approx(1 / 8)
    assert float(shift.logit_error_rms) == pytest.approx(math.sqrt(9 / 16))
