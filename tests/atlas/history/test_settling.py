"""How routing settles, by hand: saturation, its value by chance, fluctuation, births and deaths."""

import numpy as np
import pytest
import torch

from lightning_moevlm.atlas.history.settling import Chosen, Turn, settle
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.metrics.routing_shift import chosen_overlap


def chosen(rows: list[list[int]], num_experts: int = 4) -> Chosen:
    found = np.zeros((len(rows), num_experts), dtype=np.bool_)
    for row, experts in enumerate(rows):
        found[row, experts] = True
    return found


EARLY = chosen([[0, 1], [2], [3, 0], [1, 0]])
FINAL = chosen([[1, 2], [2, 3], [3, 0], [2]])


def test_saturation_and_fluctuation_by_hand() -> None:
    first, last = settle([1, 9], [(EARLY, FINAL)]).points
    # shared: {1} of {1, 2}; {2} of {2, 3}; both of {3, 0}; none of {2}
    assert first.saturation == pytest.approx((1 / 2 + 1 / 2 + 2 / 2 + 0) / 4) and last.saturation == 1
    assert first.saturation == pytest.approx(float(chosen_overlap(torch.from_numpy(EARLY), torch.from_numpy(FINAL))))
    # tokens have 0 1 2 3 early at rates 3/4 1/2 1/4 1/4; the end wants them at (1/2, 1/2, 2, 1) / 4
    assert first.by_chance == pytest.approx((0.5 * 0.75 + 0.5 * 0.5 + 2 * 0.25 + 1 * 0.25) / 4)
    # kept of the early ones: {1} of {0, 1}; {2}; {3, 0}; none of {1, 0}
    assert first.fluctuation is None and last.fluctuation == pytest.approx(1 - (1 / 2 + 1 + 1 + 0) / 4)
    assert first.load_E == pytest.approx((3 / 7, 2 / 7, 1 / 7, 1 / 7))


def test_blocks_add_up() -> None:
    apart = settle([1, 9], [(EARLY[:1], FINAL[:1]), (EARLY[1:], FINAL[1:])])
    assert apart == settle([1, 9], [(EARLY, FINAL)]) and apart.num_tokens == 4


def test_chance_is_what_independent_choices_give() -> None:
    random = np.random.default_rng(0)
    first, second = (np.eye(4, dtype=np.bool_)[random.choice(4, 20_000, p=[0.6, 0.2, 0.1, 0.1])] for _ in range(2))
    early = settle([1, 2], [(first, second)]).points[0]
    assert early.saturation == pytest.approx(early.by_chance, abs=0.01)


def test_births_and_deaths_are_between_checkpoints() -> None:
    course = [chosen([[0], [1], [1]], 3), chosen([[0], [0], [2]], 3), chosen([[0], [1], [2]], 3)]
    found = settle([10, 20, 30], [course])
    assert found.turns == (Turn(20, 1, "death"), Turn(20, 2, "birth"), Turn(30, 1, "birth"))
    assert [point.alive for point in found.points] == [2, 2, 3]
    assert [point.step for point in found.points] == [10, 20, 30]
    assert found.points[1].fluctuation == pytest.approx(2 / 3)


def test_an_expert_below_a_hundredth_of_the_even_load_is_dead() -> None:
    # of two experts the even load is 1 / 2, so 0.001 is dead and 0.005 is not
    few, enough = (chosen([[0]] * (1000 - number) + [[1]] * number, 2) for number in (1, 5))
    assert [point.alive for point in settle([1, 2], [(few, enough)]).points] == [1, 2]


def test_a_layer_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="no token that this layer routes"):
        settle([1, 2], [])
