"""The lead of a sign over the loss, by hand."""

import math

import pytest

from lightning_moevlm.study.matrix.signs import find_lead
from lightning_moevlm.tracking.read.series import Series

STEPS = (0, 10, 20, 30, 40)


def runs(*values: tuple[float, ...]) -> list[Series]:
    return [Series(STEPS[: len(one)], one) for one in values]


HEALTHY = runs((1.0, 1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0, 2.0))
FROM_30 = runs((1.0, 1.5, 1.0, 3.0, 3.0), (2.0, 3.0, 1.5, 4.0, 4.0))


@pytest.mark.parametrize(
    ("sign", "step", "text"),
    [
        (runs((1, 3, 3, 3, 3), (2, 3, 3, 3, 3)), 10, "leads: step 10, the loss at 30"),
        (runs((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)), 0, "leads: step 0, the loss at 30"),  # below is out of range too
        (runs((1, 3, 1, 3, 3), (2, 3, 3, 3, 3)), 30, "with the loss: step 30, the loss at 30"),  # a break at 20
        (runs((1, 1, 1, 1, 3), (2, 2, 2, 2, 3)), 40, "follows: step 40, the loss at 30"),
        (runs((1, 1, 1, 1, 3), (2, 2, 2, 2, 2)), None, "stays in the healthy range; the loss leaves it at step 30"),
        (runs((1, 1, 3, 3, 1), (2, 2, 3, 3, 1)), 20, "leads: step 20, the loss at 30"),  # it may fall back later
        (runs((1, 3, 3, 3, 3)), None, "not logged by two runs of each model"),
    ],
)
def test_lead_of_a_sign(sign: list[Series], step: int | None, text: str) -> None:
    found = find_lead("x", sign, HEALTHY, FROM_30, HEALTHY)
    assert (found.step, found.text) == (step, text)


def test_a_loss_that_comes_back_has_not_parted() -> None:
    found = find_lead("x", FROM_30, HEALTHY, runs((3, 3, 3, 3, 1), (3, 3, 3, 3, 1)), HEALTHY)
    assert found.text == "the loss does not leave the healthy range for good"


def test_a_run_that_is_lost_is_out_of_range() -> None:
    lost = runs((1, 1, math.nan), (2, 2, 3))
    found = find_lead("x", runs((1, 3, 3), (2, 3, 3)), HEALTHY, lost, HEALTHY)
    assert (found.step, found.loss_step, found.lead) == (10, 20, 10)  # both runs end at step 20
