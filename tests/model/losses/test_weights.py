"""Weights that follow what routing does, by hand."""

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.model.losses import AuxiliaryLosses, ByOverflow, BySparsity, LayerCounts, LoadBalance, ReLUL1
from lightning_moevlm.model.losses.weights import HIGHEST, LOWEST
from lightning_moevlm.training.actions.loss_weights import LossWeights


def counts(chosen: list[int], kept: list[int] | None = None, *, tokens: int = 8, aimed: float = 0.5) -> LayerCounts:
    """Of a layer that saw images alone; the router aims at `aimed` x E experts per token."""
    chosen_AE, kept_AE = (torch.tensor([row, [0] * len(row)]) for row in (chosen, kept or chosen))
    return LayerCounts(chosen_AE, kept_AE, torch.tensor([tokens, 0]), aimed, chosen_AE.new_zeros(0))


def test_by_overflow_by_hand() -> None:
    rule = ByOverflow(0.25, factor=1.5)
    weight = torch.tensor(0.5)
    # 8 chosen: 3 dropped is above a quarter, 1 below, 2 is it
    assert float(rule.next(weight, [counts([6, 2], [3, 2])])) == pytest.approx(0.75)
    assert float(rule.next(weight, [counts([6, 2], [5, 2])])) == pytest.approx(0.5 / 1.5)
    assert float(rule.next(weight, [counts([6, 2], [4, 2])])) == pytest.approx(0.5)
    # pooled over layers: 3 of 8 and 0 of 8 are 3 of 16, below a quarter
    assert float(rule.next(weight, [counts([6, 2], [3, 2]), counts([4, 4])])) == pytest.approx(0.5 / 1.5)


def test_the_median_over_steps_is_steered_not_the_mean() -> None:
    # drop rates of 1/8, 1/8 and 7/8: the median is below the aim of a quarter, the mean (3/8) above it; down 1.5 in all
    weight = torch.tensor(0.5)
    for kept in ([5, 2], [5, 2], [1, 0]):
        weight = ByOverflow(0.25, factor=1.5).next(weight, [counts([6, 2], kept)])
    assert float(weight) == pytest.approx(0.5 / 1.5)


def test_by_sparsity_by_hand() -> None:
    # ReMoE: 8 tokens of 4 experts, aimed at 1 of 4: 8 active pairs
    rule = BySparsity()
    weight = torch.tensor(1e-8)
    assert float(rule.next(weight, [counts([5, 4, 0, 0], aimed=0.25)])) == pytest.approx(1.2e-8)
    assert float(rule.next(weight, [counts([4, 3, 0, 0], aimed=0.25)])) == pytest.approx(1e-8 / 1.2)
    assert float(rule.next(weight, [counts([4, 4, 0, 0], aimed=0.25)])) == pytest.approx(1e-8)


@pytest.mark.parametrize("chosen", [[0, 0], [9, 9]])
def test_a_weight_never_gets_where_it_could_not_come_back_from(chosen: list[int]) -> None:
    weight = torch.tensor(1.0)
    for _ in range(400):
        weight = BySparsity().next(weight, [counts(chosen, tokens=4)])
    assert float(weight) == pytest.approx(LOWEST if chosen == [0, 0] else HIGHEST)


def test_ranges_are_checked() -> None:
    with pytest.raises(UserError, match=r"start of an adaptive weight is 0\.0: choose a value from 1e-12 up to"):
        BySparsity(start=0.0)
    with pytest.raises(UserError, match="factor"):
        ByOverflow(0.1, factor=0.9)


def test_weights_in_force_are_scheduled_or_adaptive() -> None:
    losses = AuxiliaryLosses(LoadBalance(Ramp(0.0, 1.0, 10)), relu_l1=ReLUL1())
    weights = LossWeights(losses)
    at_five = weights.at(5)
    assert at_five["load_balance"] == 0.5 and at_five["router_z"] == 1e-3
    assert float(at_five["relu_l1"]) == pytest.approx(1e-8)
    weights.update([counts([9, 9], tokens=4)])
    assert float(weights.at(5)["relu_l1"]) == pytest.approx(1.2e-8)
    assert float(at_five["relu_l1"]) == pytest.approx(1e-8)  # what a step was made with stays what it was


def test_state_travels_and_what_is_no_longer_adaptive_is_left() -> None:
    old = LossWeights(AuxiliaryLosses(relu_l1=ReLUL1(), load_balance=LoadBalance(ByOverflow(0.1))))
    old.update([counts([9, 9], tokens=4)])
    assert old.state_dict().keys() == {"relu_l1", "load_balance"}
    new = LossWeights(AuxiliaryLosses(relu_l1=ReLUL1()))
    new.load_state_dict(old.state_dict())
    assert new.state_dict().keys() == {"relu_l1"}
    assert float(new.at(0)["relu_l1"]) == float(old.at(0)["relu_l1"]) and new.at(0)["load_balance"] == 1e-2


def test_a_dense_model_moves_no_weight() -> None:
    weights = LossWeights(AuxiliaryLosses(relu_l1=ReLUL1()))
    weights.update([])
    assert float(weights.at(1)["relu_l1"]) == pytest.approx(1e-8)
