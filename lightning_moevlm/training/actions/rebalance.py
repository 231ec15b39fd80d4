"""Loss-free balancing: passes expert loads to routers with a balancing bias.

`Router.rebalance` moves a router's state, such as the bias of `SigmoidBiasRouter` (arXiv 2408.15664, algorithm 1), by
the counts of its own choices and by its tally, over all micro-batches and ranks of the step. It is on for every router
with such state and needs no option.
"""

from collections.abc import Sequence

from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.model.routers import Router
from lightning_moevlm.training.actions.action import Action, StepFacts, Training
from lightning_moevlm.training.optim.named_parts import is_frozen


class Rebalancer(Action):
    """Rebalances every self-balancing router.

    Args:
        last_step: last step before routers are frozen; None for never.
    """

    needs = frozenset({"load"})

    def __init__(self, last_step: int | None = None) -> None:
        self._last_step = last_step

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Rebalance each router; its state stays if it is frozen or the update was undone."""
        if self._last_step is None or facts.step <= self._last_step:
            for path, counts in facts.counts.items():
                layer = training.backbone.get_submodule(path)
                assert isinstance(layer, Mixture)
                if is_frozen(layer.router):
                    continue
                before = {name: buffer.clone() for name, buffer in layer.router.named_buffers()}
                layer.router.rebalance(counts.chosen_AE, counts.tally)
                for name, buffer in layer.router.named_buffers():
                    buffer.copy_(facts.unless_skipped(buffer, before[name]))
        return {}


def find_self_balancing(backbone: Backbone) -> Sequence[Router]:
    """Return the routers with balancing state of their own."""
    layers = (module for module in backbone.modules() if isinstance(module, Mixture))
    return [layer.router for layer in layers if type(layer.router).rebalance is not Router.rebalance]
