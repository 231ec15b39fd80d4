"""Values that change over steps, by hand."""

import math

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.schedules import Ramp, Shape, value_at


def test_a_plain_number_is_a_constant_schedule() -> None:
    assert value_at(0.01, 0) == value_at(0.01, 10**6) == 0.01


@pytest.mark.parametrize(
    ("shape", "quarter"),
    [
        ("linear", 2 + 4 / 4),  # a quarter of the way from 2 to 6
        ("cosine", 2 + 4 * (1 - math.sqrt(0.5)) / 2),  # cos(pi / 4) = sqrt(1 / 2)
        ("sqrt", 2 + 4 / 2),  # sqrt(1 / 4) = 1 / 2
    ],
)
def test_ramp_by_hand(shape: Shape, quarter: float) -> None:
    ramp = Ramp(start=2.0, stop=6.0, num_steps=8, begin=10, shape=shape)
    assert [value_at(ramp, step) for step in (0, 9, 10)] == [2.0, 2.0, 2.0]
    assert value_at(ramp, 12) == pytest.approx(quarter)
    assert [value_at(ramp, step) for step in (18, 19, 1000)] == [6.0, 6.0, 6.0]
    values = [value_at(ramp, step) for step in range(10, 19)]
    assert values == sorted(values)


def test_a_ramp_of_no_steps_is_a_jump() -> None:
    jump = Ramp(start=0.0, stop=1.0, num_steps=0, begin=5)
    assert [jump(step) for step in (4, 5, 6)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps of a ramp is -1"),
        ({"num_steps": 1, "begin": -2}, "begin of a ramp is -2"),
        ({"num_steps": 1, "stop": math.nan}, "stop of a ramp is nan: give a finite number"),
    ],
)
def test_impossible_ramps_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Ramp(**({"start": 0.0, "stop": 1.0} | options))
