"""Anticipatory routing: for a while after a loss spike, experts are chosen by the routers of some steps ago.

    step t, while on:   experts  by the routers' weights and balancing state of `delay` steps before
                        weights of the experts, and everything else, by the current ones

DeepSeek-V4 (section 4.2.3) ties its spikes to outliers of MoE layers that routing makes worse: a rollback alone let
them return, and taking routing one step out of the loop did not. There it is switched on by a spike, with a short
rollback, for a limited time. The report was read in notes about it; its delay and duration are not known, so the
defaults are ours.

Two things differ from the report. There the whole network of `delay` steps before chooses, in a forward pass made
ahead; here the routers alone are old, and see current tokens. That costs one more product of the routers instead of a
forward pass (about 20 % of the time there), and `delay` + 2 copies of the routers instead of choices kept for a batch:
2 D E (delay + 2) numbers at two layers of E experts. And here the rule of a spike is that of `rollback`: without that
action the loss is the trigger, with it each rollback is one too.

In evaluation the current routers choose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.model.routers import EarlierChoices
from lightning_moevlm.training.actions.action import Action, Fact, StepFacts, Training
from lightning_moevlm.training.actions.rollback import add_good_loss, is_bad
from lightning_moevlm.training.optim.named_parts import is_frozen


@dataclass(frozen=True)
class AnticipateRouting:
    """Chooses experts by older routers for a while after a loss spike.

    Args:
        delay: age of the routers that choose, in optimiser steps.
        num_steps: optimiser steps after a spike or a rollback; null is on from the first step to the last.
        spike_threshold: standard deviations above the mean of the last good losses that make a spike; null answers
            losses that are not finite, and rollbacks, alone.
        window: good losses in mean and std.

    Raises:
        UserError: a value outside its range.
    """

    delay: int = 10
    num_steps: int | None = 100
    spike_threshold: float | None = 7.0
    window: int = 100

    def __post_init__(self) -> None:
        """Check ranges."""
        check_number("actions.anticipate_routing.delay", self.delay, least=1, advice=" optimiser steps")
        check_number("actions.anticipate_routing.window", self.window, least=2, advice=" losses")
        if self.num_steps is not None:
            check_number("actions.anticipate_routing.num_steps", self.num_steps, least=1, advice=", or null for always")
        if self.spike_threshold is not None:
            check_number(
                "actions.anticipate_routing.spike_threshold", self.spike_threshold, above=0, advice=", or null"
            )

    def check(self, backbone: Backbone) -> None:
        """Refuse a model on which it cannot act.

        Raises:
            UserError: no mixture of experts, a router that cannot take another's choices, or none that is trained.
        """
        layers = [module for module in backbone.modules() if isinstance(module, Mixture)]
        for layer in layers:
            if not layer.router.takes_choices:
                raise UserError(
                    f"actions.anticipate_routing cannot act with {type(layer.router).__name__}, whose weights do not "
                    "follow from other experts: choose TopKRouter, SigmoidBiasRouter, GroupLimitedRouter, "
                    "NoisyTopKRouter or CosineRouter, or set model.actions.anticipate_routing to null"
                )
        if not layers or all(is_frozen(layer.router) for layer in layers):
            raise UserError(
                "actions.anticipate_routing cannot act on this model, which trains no router: set "
                "model.actions.anticipate_routing to null, or train a router"
            )


class Kept(NamedTuple):
    """The routers after `step` optimiser steps: by layer, parameters and buffers by name."""

    step: int
    routers: dict[str, dict[str, Tensor]]


class RoutingAnticipator(Action):
    """Keeps the routers of the last steps, and lets the oldest choose.

    Args:
        options: when, how old, how long.
        backbone: its mixtures are given choices.
    """

    def __init__(self, options: AnticipateRouting, backbone: Backbone) -> None:
        self._options = options
        self.needs: frozenset[Fact] = frozenset() if options.num_steps is None else frozenset({"loss"})
        self._layers = {path: layer for path, layer in backbone.named_modules() if isinstance(layer, Mixture)}
        self._choices: dict[str, EarlierChoices] = {}  # by layer, from the first step that is on
        self._kept: list[Kept] = []  # the oldest first
        self._losses: list[float] = []
        self._steps_left = 0

    @property
    def is_on(self) -> bool:
        """Whether older routers choose in the coming step."""
        return self._options.num_steps is None or self._steps_left > 0

    @property
    def chosen_by(self) -> int | None:
        """The step of the routers that choose, or would; None before training."""
        return self._kept[0].step if self._kept else None

    def earlier(self, path: str) -> EarlierChoices:
        """Return the choices of the oldest router of a layer."""
        if path not in self._choices:
            self._choices[path] = EarlierChoices(self._layers[path].router)
        self._choices[path].load(self._kept[0].routers[path])
        return self._choices[path]

    def prepare(self, step: int) -> None:
        """Keep the routers of this step, and give each layer its choices for the next one."""
        if not self._kept or self._kept[-1].step != step:  # a checkpoint brings those of its step
            now = {path: _copies(layer.router.state_dict()) for path, layer in self._layers.items()}
            self._kept = [*self._kept, Kept(step, now)][-(self._options.delay + 1) :]
        for path, layer in self._layers.items():
            layer.choose = self.earlier(path) if self.is_on else None

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Count down, and look for a spike."""
        if self._options.num_steps is None:
            return {}
        assert facts.loss is not None
        loss, was_on = float(facts.loss), self.is_on
        self._steps_left = max(0, self._steps_left - 1)
        if is_bad(loss, self._losses, self._options):
            self._steps_left = self._options.num_steps
        else:
            self._losses = add_good_loss(self._losses, loss, self._options.window)
        return {} if self.is_on == was_on else _event(self.is_on)

    def after_rollback(self) -> dict[str, float]:
        """Switch on."""
        if self._options.num_steps is None:
            return {}
        self._steps_left = self._options.num_steps
        return _event(True)

    def state_dict(self) -> dict[str, Any]:
        """Return the routers kept, the window and the steps left."""
        return {"kept": [kept._asdict() for kept in self._kept], "losses": self._losses, "left": self._steps_left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them."""
        self._kept = [Kept(**kept) for kept in state["kept"]]
        self._losses, self._steps_left = list(state["losses"]), int(state["left"])


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _event(is_on: bool) -> dict[str, float]:
    return {metric_keys.ANTICIPATED_ROUTING.key(): float(is_on)}
