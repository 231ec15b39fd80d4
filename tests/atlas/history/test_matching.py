"""Experts of two seeds are matched by their tokens: other names are found again, chance is not taken for agreement."""

import numpy as np
import pytest
from numpy.typing import NDArray

from lightning_moevlm.atlas.history.matching import match_experts
from lightning_moevlm.atlas.history.settling import Chosen

NUM_EXPERTS, NUM_TOKENS = 4, 400
POSITION_T = np.arange(NUM_TOKENS) % 10


def top_1(expert_T: NDArray[np.int64]) -> Chosen:
    return np.eye(NUM_EXPERTS, dtype=np.bool_)[expert_T]


def drawn(seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).choice(NUM_EXPERTS, NUM_TOKENS, p=[0.4, 0.3, 0.2, 0.1])


def test_the_same_experts_under_other_names_are_found() -> None:
    expert_T, names = drawn(0), np.array([2, 0, 3, 1])
    found = match_experts(top_1(expert_T), top_1(names[expert_T]), POSITION_T)
    assert found.partner == (2, 0, 3, 1)
    assert found.agreement == 1 and found.shared == (1.0,) * 4
    assert found.loads.repeats == 1 and found.loads.p == pytest.approx(1 / 200) == found.positions.p
    assert 0.25 < found.loads.mean < 0.45, "loads alone give the sum of squares, 0.30, and what matching fits"


def test_agreement_by_hand() -> None:
    # experts 0 and 1 swap names; of expert 1's tokens half go astray
    mine, theirs = np.array([0, 0, 1, 1]), np.array([1, 1, 0, 2])
    found = match_experts(top_1(mine), top_1(theirs), np.arange(4), draws=0)
    assert found.partner[:2] == (1, 0) and found.agreement == 3 / 4 and found.shared == (1.0, 0.5, 0.0, 0.0)


def test_experts_of_positions_repeat_beyond_loads_but_not_beyond_positions() -> None:
    by_position = top_1(POSITION_T % NUM_EXPERTS)
    found = match_experts(by_position, by_position[:, [1, 2, 3, 0]], POSITION_T)
    assert found.agreement == 1 and found.loads.p < 0.01
    assert found.positions.mean == 1 and found.positions.p == 1


def test_independent_runs_do_not_repeat() -> None:
    found = [
        match_experts(top_1(drawn(seed)), top_1(drawn(seed + 1)), POSITION_T, draws=39) for seed in range(0, 40, 2)
    ]
    for null in ("loads", "positions"):
        nulls = [getattr(each, null) for each in found]
        assert abs(float(np.mean([each.repeats for each in nulls]))) < 0.02
        # p is uniform: of 20 values five or more are at most 0.05 in 3 of 1,000 cases
        assert sum(each.p <= 0.05 for each in nulls) < 5


def test_a_token_may_have_several_experts_and_runs_may_have_other_numbers() -> None:
    mine = top_1(np.array([0, 2, 0])) | top_1(np.array([1, 3, 1]))
    theirs = top_1(np.array([3, 1, 2])) | top_1(np.array([2, 0, 3]))
    found = match_experts(mine, theirs, np.arange(3), draws=0)
    assert found.agreement == 1 and set(found.partner[:2]) == {2, 3} and found.num_tokens == 3
    fewer = match_experts(mine, theirs[:, :2], np.arange(3), draws=0)
    assert sorted(fewer.partner)[:2] == [-1, -1] and fewer.agreement == pytest.approx(2 / 6)
