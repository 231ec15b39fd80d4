"""Routing losses of other packages stand in the set beside our own, under distinct names."""

from dataclasses import dataclass
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.losses import (
    OWN_LOSSES,
    AuxiliaryLosses,
    ByOverflow,
    LossInput,
    RoutedLayer,
    RouterZ,
    RoutingLoss,
)
from lightning_moevlm.model.losses.weights import Weight
from tests.routing import top_1_plan


@dataclass(frozen=True)
class MostProbable(RoutingLoss):
    """Mean of the largest probability; undefined for one expert."""

    weight: Weight = 0.5

    def __call__(self, inputs: LossInput) -> Tensor | None:
        return inputs.plan.probs_TE.max(dim=-1).values.mean() if inputs.plan.num_experts > 1 else None

    def check(self, layer: RoutedLayer) -> None:
        if layer.mixes:
            raise UserError("no loss for routers that mix")


def test_it_is_averaged_over_plans_beside_our_own() -> None:
    # the largest of (3/4, 1/4) is 3/4, of (1/2, 1/2) 1/2: mean 5/8; of one expert nothing is said
    plans = [top_1_plan(torch.tensor([row]).log()) for row in ([3.0, 1.0], [1.0, 1.0], [1.0])]
    losses = AuxiliaryLosses(None, RouterZ(0.1), others={"sure": MostProbable(), "off": None})
    terms = losses.terms([LossInput(plan) for plan in plans])
    assert list(terms) == ["router_z", "sure"] and losses.weights == {"router_z": 0.1, "sure": 0.5}
    torch.testing.assert_close(terms["sure"].raw, torch.tensor(5 / 8))
    torch.testing.assert_close(terms["sure"].weighted, torch.tensor(5 / 16))
    assert (losses.key("sure"), losses.key("router_z")) == ("losses.others.sure", "losses.router_z")
    assert AuxiliaryLosses(None, None, others={"sure": MostProbable(ByOverflow(0.1))}).adapts
    assert not losses.balancing


def test_eight_own_losses_balance() -> None:
    kinds = {name: get_args(hint)[0] for name, hint in get_type_hints(AuxiliaryLosses).items() if name in OWN_LOSSES}
    both = ("load_balance", "cross_layer_balance")  # the same balance, so one of them alone may be on
    one, other = (
        AuxiliaryLosses(**{name: None if name == off else kind() for name, kind in kinds.items()}) for off in both
    )
    common = {"importance", "load", "gshard", "sequence_balance", "global_entropy", "mutual_information"}
    assert one.balancing == common | {"cross_layer_balance"}
    assert other.balancing == common | {"load_balance"}
    assert one.enabled.keys() | other.enabled.keys() == set(OWN_LOSSES)


def test_it_may_refuse_a_router() -> None:
    losses = AuxiliaryLosses(others={"sure": MostProbable()})
    with pytest.raises(UserError, match="no loss for routers that mix"):
        losses.check([RoutedLayer("SoftRouter", num_experts=2, adds_noise=False, mixes=True, has_rows=True)])


@pytest.mark.parametrize("name", ["router_z", "Sure", "a.b", "", "1st"])
def test_a_name_that_is_taken_or_none_is_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=r"choose a name of lower-case letters, digits and _ that is not one of load_balance, "
    ):
        AuxiliaryLosses(others={name: MostProbable()})


def test_a_weight_below_0_is_refused_by_its_key() -> None:
    with pytest.raises(UserError, match=r"losses\.others\.sure\.weight is -1\.0: choose 0 or more"):
        AuxiliaryLosses(others={"sure": MostProbable(-1.0)})
