"""Loss-free balancing: routers that balance themselves are told the counts of the step.

`Router.rebalance` moves a router's state, such as the bias of `SigmoidBiasRouter` (arXiv 2408.15664, algorithm 1), on
the counts of the router's own choices. It is on wherever a router has such state and needs no option.
"""

from collections.abc import Sequence

from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.routers import Router
from lightning_moevlm.training.actions.action import Action, StepFacts, Training


class Rebalancer(Action):
    """Tells every self-balancing router its counts.

    Args:
        last_step: the step after which routers stand still; None for never.
    """

    needs = frozenset({"load"})

    def __init__(self, last_step: int | None = None) -> None:
        self._last_step = last_step

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Rebalance each router; its balancing state stays where the update was undone."""
        if self._last_step is None or facts.step <= self._last_step:
            for path, load_AE in facts.load.items():
                layer = training.backbone.get_submodule(path)
                assert isinstance(layer, MoEFFN)
                before = {name: buffer.clone() for name, buffer in layer.router.named_buffers()}
                layer.router.rebalance(load_AE)
                for name, buffer in layer.router.named_buffers():
                    buffer.copy_(facts.unless_skipped(buffer, before[name]))
        return {}


def find_self_balancing(backbone: Backbone) -> Sequence[Router]:
    """Return the routers with balancing state of their own; without any, nothing need be counted."""
    layers = (module for module in backbone.modules() if isinstance(module, MoEFFN))
    return [layer.router for layer in layers if type(layer.router).rebalance is not Router.rebalance]
