"""Freeze the routers after some steps: what is learnt from then on is learnt by fixed assignments.

StableMoE (arXiv 2204.08396, section 3.2) trains the router first and freezes it, because tokens that keep changing
experts waste what the experts learnt of them. Here the gradient of every router parameter is taken away before the
optimiser looks: it then neither steps, nor decays, nor moves on old momentum. Balancing state of a router stands still
too. The parameters keep `requires_grad`, which data-parallel training could not bear to lose half-way.
"""

from dataclasses import dataclass

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.training.actions.action import Action, StepFacts, Training


@dataclass(frozen=True)
class FreezeRouter:
    """Routers stand still after a number of steps.

    Args:
        after_steps: optimiser steps in which they learn; 0 leaves them at their start.

    Raises:
        UserError: a negative number.
    """

    after_steps: int = 1000

    def __post_init__(self) -> None:
        """Check the range."""
        check_number("actions.freeze_router.after_steps", self.after_steps, least=0, advice=" optimiser steps")


class RouterFreezer(Action):
    """Takes the gradients of routers away.

    Args:
        options: when.
    """

    def __init__(self, options: FreezeRouter) -> None:
        self._options = options

    def before_step(self, training: Training, step: int) -> None:
        """Leave the optimiser nothing to do for routers."""
        if step > self._options.after_steps:
            for module in training.backbone.modules():
                if isinstance(module, MoEFFN):
                    for parameter in module.router.parameters():
                        parameter.grad = None

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Tell of the first step without routers."""
        return {metric_keys.ROUTER_FROZEN.key(): 1.0} if facts.step == self._options.after_steps + 1 else {}
