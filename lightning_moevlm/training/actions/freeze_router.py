"""Freezes the routers after some steps: experts then train on fixed assignments.

StableMoE (arXiv 2204.08396, section 3.2) trains the router first and freezes it, because experts forget tokens that
keep changing between them. Here the gradients of router parameters are removed before the optimiser's step, so it
neither updates, nor decays, nor applies old momentum. Balancing state is frozen too. The parameters keep
`requires_grad`, because data-parallel training cannot drop it midway.
"""

from dataclasses import dataclass

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.training.actions.action import Action, StepFacts, Training


@dataclass(frozen=True)
class FreezeRouter:
    """Freezes routers after a number of optimiser steps.

    Args:
        after_steps: optimiser steps before the freeze; 0 keeps the initial routers.

    Raises:
        UserError: a negative number.
    """

    after_steps: int = 1000

    def __post_init__(self) -> None:
        check_number("actions.freeze_router.after_steps", self.after_steps, least=0, advice=" optimiser steps")


class RouterFreezer(Action):
    """Removes the gradients of routers.

    Args:
        options: the step of the freeze.
    """

    def __init__(self, options: FreezeRouter) -> None:
        self._options = options

    def before_step(self, training: Training, step: int) -> None:
        """Remove the gradients, so the optimiser skips routers."""
        if step > self._options.after_steps:
            for module in training.backbone.modules():
                if isinstance(module, Mixture):
                    for parameter in module.router.parameters():
                        parameter.grad = None

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Report the first frozen step."""
        return {metric_keys.ROUTER_FROZEN.key(): 1.0} if facts.step == self._options.after_steps + 1 else {}
