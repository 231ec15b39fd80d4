"""Capacity by hand: who stays, who is dropped."""

import pytest
import torch

from lightning_moevlm.dispatch import apply_capacity
from lightning_moevlm.plans import PairPlan
from tests.routing import top_1_plan


def plan_of(experts: list[int], weights: list[float], num_experts: int = 2) -> PairPlan:
    plan = top_1_plan(torch.zeros(len(experts), num_experts))
    return plan._replace(expert_N=torch.tensor(experts), weight_N=torch.tensor(weights))


def test_position_priority_keeps_the_first() -> None:
    # 4 pairs, 2 experts, factor 1: capacity ceil(1 * 4 / 2) = 2. Expert 0 is wanted by pairs 0, 1, 3: pair 3 is late.
    plan = plan_of([0, 0, 1, 0], [0.1, 0.2, 0.3, 0.9])
    assert apply_capacity(plan, 1.0, "position").kept_N.tolist() == [True, True, True, False]


def test_gate_priority_keeps_the_surest() -> None:
    # the same, by gate weight: of 0.1, 0.2 and 0.9 the smallest goes
    plan = plan_of([0, 0, 1, 0], [0.1, 0.2, 0.3, 0.9])
    assert apply_capacity(plan, 1.0, "gate").kept_N.tolist() == [False, True, True, True]


def test_capacity_is_rounded_up() -> None:
    # 5 pairs, 2 experts, factor 1: ceil(2.5) = 3
    plan = plan_of([0, 0, 0, 0, 0], [0.5] * 5)
    assert int(apply_capacity(plan, 1.0, "position").kept_N.sum()) == 3


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.bfloat16])
def test_capacity_is_exact_under_every_precision(default_dtype: torch.dtype) -> None:
    # bf16-true makes bf16 the default dtype; 1.25 * 5000 / 8 = 781.25 became 780, and in fp32 1.2 * 25 / 3 became 11
    torch.set_default_dtype(default_dtype)
    try:
        many = top_1_plan(torch.zeros(5000, 8))._replace(expert_N=torch.zeros(5000, dtype=torch.int64))
        assert int(apply_capacity(many, 1.25, "position").kept_N.sum()) == 782
        few = top_1_plan(torch.zeros(25, 3))._replace(expert_N=torch.zeros(25, dtype=torch.int64))
        assert int(apply_capacity(few, 1.2, "position").kept_N.sum()) == 10
    finally:
        torch.set_default_dtype(torch.float32)


def test_padding_takes_no_place() -> None:
    # pairs 0 and 1 are padding: 2 real pairs, 2 experts, factor 1: capacity 1, and pair 2 gets it
    plan = plan_of([0, 0, 0, 0], [0.9, 0.9, 0.1, 0.2])
    valid = torch.tensor([False, False, True, True])
    limited = apply_capacity(plan._replace(kept_N=valid, valid_T=valid), 1.0, "position")
    assert limited.kept_N.tolist() == [False, False, True, False]


def test_first_choices_come_before_second_ones() -> None:
    # two tokens, k = 2, choice-major: (t0 -> 0), (t1 -> 1), (t0 -> 1), (t1 -> 0). factor 0.5: capacity 1 each.
    plan = plan_of([0, 1, 1, 0], [0.6, 0.6, 0.4, 0.4])._replace(token_N=torch.tensor([0, 1, 0, 1]))
    assert apply_capacity(plan, 0.5, "position").kept_N.tolist() == [True, True, False, False]


def test_only_kept_changes() -> None:
    plan = plan_of([0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4])
    limited = apply_capacity(plan, 0.5, "gate")
    assert all(a is b for name, a, b in zip(plan._fields, plan, limited, strict=True) if name != "kept_N")
