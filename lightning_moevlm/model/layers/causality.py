"""Refuses parts through which an earlier token of a causal model depends on a later one.

A router whose tokens compete for places looks ahead: expert choice leaks the future of a sequence into its training
loss (arXiv 2408.15664, section 5). Capacity does the same if a later token can be served
first, or can take a varying number of experts: places are a share of all choices. Samples of one batch may share
capacity: causal means within a sequence.
"""

from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model import routers
from lightning_moevlm.model.layers.feed_forward.mixture import Mixture
from lightning_moevlm.model.routers import Router


def check_causal(backbone: nn.Module) -> None:
    """Refuse MoE layers that would let a token see later ones.

    Raises:
        UserError: a router that competes, or a capacity in which a later token can take the place of an earlier one.
    """
    for module in backbone.modules():
        if isinstance(module, Mixture):
            _check_router(module)
            _check_capacity(module)


def list_causal_routers() -> list[str]:
    """Return the names of our routers whose tokens do not compete."""
    found = (getattr(routers, name) for name in routers.__all__)
    return [each.__name__ for each in found if issubclass(each, Router) and each is not Router and not each.competes]


def _check_router(layer: Mixture) -> None:
    if layer.router.competes:
        raise UserError(
            f"a causal model cannot use {type(layer.router).__name__}: its tokens compete for experts across "
            "positions, so what an early token gets depends on later ones; use a router that decides token by token "
            f"({', '.join(list_causal_routers())}), or an objective that is not causal"
        )


def _check_capacity(layer: Mixture) -> None:
    capacity, top_k = layer.capacity, layer.router.experts_per_token
    if capacity is None or capacity.train_factor is capacity.eval_factor is None:
        return
    if capacity.competes:
        raise UserError(
            f"a causal model cannot use capacity priority {capacity.priority}: a later token with a larger gate would "
            "take the place of an earlier one; set capacity.priority to token, or capacity to null (dropless)"
        )
    if layer.free is not None:
        raise UserError(
            "a causal model cannot limit capacity with moe.free: how many tokens leave the other experts out differs, "
            "so the places of early ones depend on later ones; set capacity to null (dropless), or moe.free to null"
        )
    if layer.router.choices_vary:
        raise UserError(
            f"a causal model cannot limit capacity with {type(layer.router).__name__}: the number of "
            "experts differs between its tokens, so the places of early ones depend on later ones; set capacity to "
            "null (dropless), or use a router with a fixed number of experts per token, such as TopKRouter"
        )
    if top_k > 1 and capacity.priority != "token":
        raise UserError(
            f"a causal model cannot limit capacity with {top_k:g} experts per token: every first choice is served "
            "before any second one, so a later token would take the place of an earlier one; set capacity.priority to "
            "token, capacity to null (dropless), or top_k to 1"
        )
