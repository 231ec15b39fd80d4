"""The ERC loss by hand: its value, its noise, and the routers that it takes."""

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.losses import AuxiliaryLosses, ExpertCoupling, LossInput, RoutedLayer
from lightning_moevlm.model.losses.regularising.expert_coupling import couple, draw_noise, noise_bound
from lightning_moevlm.model.routers import CosineRouter
from lightning_moevlm.training import VisionLanguageModule
from tests.routing import top_1_plan
from tests.small_model import small_vl_moe


def test_expert_coupling_by_hand() -> None:
    # rows (3, 4) and (0, 2); experts of one hidden unit that reads the first or the second number: M = (3, 4), (0, 2).
    # At alpha 1: i = 0: M_01 - 3 = 1, M_10 - 3 < 0; i = 1: M_10 - 2 < 0, M_01 - 2 = 2; over 4
    rows_ED, first_EDF = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.eye(2).unsqueeze(-1)
    assert float(couple(rows_ED, first_EDF, 1.0)) == pytest.approx(3 / 4)
    # at alpha 0 every answer of another expert counts: 4 + 0 and 0 + 4
    assert float(couple(rows_ED, first_EDF, 0.0)) == pytest.approx(8 / 4)
    # the rows are sqrt(9 + 4) apart; half of it in units of 5 and of 2
    torch.testing.assert_close(noise_bound(rows_ED), 13**0.5 / 2 / torch.tensor([5.0, 2.0]))
    torch.testing.assert_close(noise_bound(torch.tensor([[0.0, 0.0], [0.0, 2.0]])), torch.tensor([0.0, 0.5]))
    assert noise_bound(rows_ED[:1]).tolist() == [0.0]


def test_expert_coupling_draws_within_its_bound_and_in_training_alone() -> None:
    rows_ED = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).repeat(1, 500)  # as far apart, in units of their length
    factor_ED = draw_noise(rows_ED) - 1
    bound_E = 13**0.5 / 2 / torch.tensor([5.0, 2.0])
    assert bool((factor_ED.abs() <= bound_E.unsqueeze(-1)).all())
    torch.testing.assert_close(factor_ED.abs().amax(dim=1), bound_E, rtol=0.02, atol=0)
    inputs = LossInput(top_1_plan(torch.zeros(3, 2)), rows_ED, first_EDF=torch.ones(2, 1000, 3) / torch.arange(1, 4))
    loss = ExpertCoupling(alpha=0.5)
    assert float(loss(inputs)) != float(loss(inputs))
    assert float(loss(inputs._replace(training=False))) == float(loss(inputs._replace(training=False)))


def test_expert_coupling_needs_a_row_per_expert() -> None:
    losses = AuxiliaryLosses(expert_coupling=ExpertCoupling())
    layer = RoutedLayer("TopKRouter", 4, adds_noise=False, mixes=False, has_rows=True, rows_fit_experts=True)
    losses.check([layer])
    with pytest.raises(UserError, match="TopKRouter has no row of the model's width per expert"):
        losses.check([layer._replace(rows_fit_experts=False)])
    with pytest.raises(UserError, match="CosineRouter has no row of the model's width"):
        VisionLanguageModule(small_vl_moe(router=CosineRouter), losses=losses)
    with pytest.raises(UserError, match=r"expert_coupling\.alpha is -1"):
        ExpertCoupling(alpha=-1)
