"""Capacity by hand: who stays, who is dropped."""

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.model.dispatch import Capacity, ModalityFactors, apply_capacity
from lightning_moevlm.model.metrics import capacity_factor
from tests.routing import limited, top_1_plan


def plan_of(experts: list[int], weights: list[float], num_experts: int = 2) -> PairPlan:
    plan = top_1_plan(torch.zeros(len(experts), num_experts))
    return plan._replace(expert_N=torch.tensor(experts), weight_N=torch.tensor(weights))


def test_position_priority_keeps_the_first() -> None:
    # 4 pairs, 2 experts, factor 1: capacity ceil(1 * 4 / 2) = 2. Expert 0 is wanted by pairs 0, 1, 3: pair 3 is late.
    plan = plan_of([0, 0, 1, 0], [0.1, 0.2, 0.3, 0.9])
    assert limited(plan, 1.0).kept_N.tolist() == [True, True, True, False]


def test_gate_priority_keeps_the_surest() -> None:
    # the same, by gate weight: of 0.1, 0.2 and 0.9 the smallest goes
    plan = plan_of([0, 0, 1, 0], [0.1, 0.2, 0.3, 0.9])
    assert limited(plan, 1.0, "gate").kept_N.tolist() == [False, True, True, True]


def test_capacity_is_rounded_up() -> None:
    # 5 pairs, 2 experts, factor 1: ceil(2.5) = 3
    plan = plan_of([0, 0, 0, 0, 0], [0.5] * 5)
    assert int(limited(plan, 1.0).kept_N.sum()) == 3


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.bfloat16])
def test_capacity_is_exact_under_every_precision(default_dtype: torch.dtype) -> None:
    # bf16-true makes bf16 the default dtype; 1.25 * 5000 / 8 = 781.25 became 780, in fp32 1.2 * 25 / 3 became 11, and
    # in fp64 1.1 * 50 / 5 is a little above 11
    torch.set_default_dtype(default_dtype)
    try:
        many = top_1_plan(torch.zeros(5000, 8))._replace(expert_N=torch.zeros(5000, dtype=torch.int64))
        assert int(limited(many, 1.25).kept_N.sum()) == 782
        few = top_1_plan(torch.zeros(25, 3))._replace(expert_N=torch.zeros(25, dtype=torch.int64))
        assert int(limited(few, 1.2).kept_N.sum()) == 10
        fifty = top_1_plan(torch.zeros(50, 5))._replace(expert_N=torch.zeros(50, dtype=torch.int64))
        assert int(limited(fifty, 1.1).kept_N.sum()) == 11
    finally:
        torch.set_default_dtype(torch.float32)


def test_padding_takes_no_place() -> None:
    # pairs 0 and 1 are padding: 2 real pairs, 2 experts, factor 1: capacity 1, and pair 2 gets it
    plan = plan_of([0, 0, 0, 0], [0.9, 0.9, 0.1, 0.2])
    valid = torch.tensor([False, False, True, True])
    some = limited(plan._replace(kept_N=valid, valid_T=valid), 1.0)
    assert some.kept_N.tolist() == [False, False, True, False]


def test_first_choices_come_before_second_ones() -> None:
    # two tokens, k = 2, choice-major: (t0 -> 0), (t1 -> 1), (t0 -> 1), (t1 -> 0). factor 0.5: capacity 1 each.
    plan = plan_of([0, 1, 1, 0], [0.6, 0.6, 0.4, 0.4])._replace(token_N=torch.tensor([0, 1, 0, 1]))
    assert limited(plan, 0.5).kept_N.tolist() == [True, True, False, False]
    # by token the first one gets both of its experts, and the second one, which comes later, none
    assert limited(plan, 0.5, "token").kept_N.tolist() == [True, False, True, False]


def test_only_kept_changes() -> None:
    plan = plan_of([0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4])
    some = limited(plan, 0.5, "gate")
    assert all(
        a is b for name, a, b in zip(plan._fields, plan, some, strict=True) if name not in ("kept_N", "capacity_T")
    )


def two_choices() -> PairPlan:
    # three tokens, k = 2, choice-major; first choices all want expert 0, second ones expert 1, 0, 0
    plan = top_1_plan(torch.zeros(3, 2))
    return plan._replace(
        token_N=torch.tensor([0, 1, 2, 0, 1, 2]),
        expert_N=torch.tensor([0, 0, 0, 1, 0, 0]),
        weight_N=torch.tensor([0.5, 0.4, 0.6, 0.1, 0.3, 0.9]),
        kept_N=torch.ones(6, dtype=torch.bool),
    )


def test_batch_priority_orders_tokens_and_keeps_choices_apart() -> None:
    # factor 0.5: ceil(0.5 * 6 / 2) = 2 places. Best gates: 0.5, 0.4, 0.9, so tokens are served 2, 0, 1; expert 0 takes
    # the first choices of 2 and 0. By position it takes those of 0 and 1; by probability 0.9 (pair 5) and 0.6 (pair 2).
    assert limited(two_choices(), 0.5, "gate").kept_N.tolist() == [True, False, True, True, False, False]
    assert limited(two_choices(), 0.5, "position").kept_N.tolist() == [True, True, False, True, False, False]
    assert limited(two_choices(), 0.5, "probability").kept_N.tolist() == [False, False, True, True, False, True]


def test_groups_have_places_of_their_own() -> None:
    # 4 samples of 2 tokens, all to expert 0 of 2. Whole batch, factor 0.5: ceil(0.5 * 8 / 2) = 2 places, taken by
    # sample 0. Groups of 2 samples: ceil(0.5 * 4 / 2) = 1 place each. Groups of 3: 6 pairs, ceil(1.5) = 2; 2 pairs, 1.
    plan = plan_of([0] * 8, [0.5] * 8)._replace(num_sequences=4)
    assert kept(plan, Capacity(0.5)) == [0, 1]
    assert kept(plan, Capacity(0.5, group_size=2)) == [0, 4]
    assert kept(plan, Capacity(0.5, group_size=3)) == [0, 1, 6]
    assert kept(plan, Capacity(0.5, group_size=9)) == [0, 1]


def test_a_modality_of_its_own_is_not_crowded_out() -> None:
    # 6 image pairs, then 2 text pairs, all to expert 0 of 2. Together, factor 0.5: 2 places, both taken by images.
    # Apart: images ceil(0.5 * 6 / 2) = 2, texts ceil(1.0 * 2 / 2) = 1; dropless texts keep both.
    plan = plan_of([0] * 8, [0.5] * 8)._replace(modality_T=torch.tensor([0] * 6 + [1] * 2))
    assert kept(plan, Capacity(0.5)) == [0, 1]
    assert kept(plan, Capacity(ModalityFactors(0.5, 1.0))) == [0, 1, 6]
    assert kept(plan, Capacity(ModalityFactors(0.5, None))) == [0, 1, 6, 7]


def test_the_factor_that_holds_after_rounding() -> None:
    # 10 pairs, 2 experts, factor 1.05: ceil(5.25) = 6 places, 6 * 2 / 10 = 1.2; in multiples of 4: 8 places, 1.6
    plan = plan_of([0, 1] * 5, [0.5] * 10)
    for multiple, real in ((1, 1.2), (4, 1.6)):
        some = apply_capacity(plan, Capacity(1.05, multiple_of=multiple), training=True)
        assert some.capacity_T is not None
        torch.testing.assert_close(some.capacity_T, torch.full((10,), real))
    assert apply_capacity(plan, Capacity(1.05, None), training=False).capacity_T is None
    assert capacity_factor([some], Modality.IMAGE) == pytest.approx(1.6)
    assert capacity_factor([plan], Modality.IMAGE) is None


def test_evaluation_has_its_own_factor() -> None:
    plan = plan_of([0] * 4, [0.5] * 4)
    assert kept(plan, Capacity(0.5, 1.0)) == [0]
    assert int(apply_capacity(plan, Capacity(0.5, 1.0), training=False).kept_N.sum()) == 2


def test_no_tokens() -> None:
    assert kept(plan_of([], []), Capacity(1.0, priority="gate")) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"train_factor": 0.0}, "train_factor is 0.0"),
        ({"eval_factor": ModalityFactors(-1.0, 1.0)}, "eval_factor is -1.0"),
        ({"group_size": 0}, "group_size is 0"),
        ({"multiple_of": 0}, "multiple_of is 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Capacity(**options)  # type: ignore[arg-type]


def test_priorities_that_displace_earlier_positions() -> None:
    assert [Capacity(priority=each).competes for each in ("position", "gate", "probability")] == [False, True, True]
    assert not Capacity(priority="token").competes


def kept(plan: PairPlan, capacity: Capacity) -> list[int]:
    return apply_capacity(plan, capacity, training=True).kept_N.nonzero().flatten().tolist()
