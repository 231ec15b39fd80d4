"""Revives dead experts: an expert long without tokens restarts as a noisy copy of a busy one.

An expert without tokens gets no gradient from the task, so it never recovers by itself. Its weights and its row of the
router become those of the busiest expert (the second dead one takes the second busiest, and so on), plus noise:

    w_dead = w_busy + noise * std(w_busy) * N(0, 1)

The noise on the router's row makes the two share tokens. Optimiser state of the old weights (momentum, second moments)
is set to zero for those rows. With a softmax router the two also share the probability, so each of those tokens gets
less weight at first. Restarts of idle codes are customary in vector quantisation (arXiv 2005.00341, section 3.1,
"random restarts"); for experts, only private forks have them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.initial_weights import derive_seed
from lightning_moevlm.model.layers import Mixture, MoEFFN
from lightning_moevlm.model.routers import ExpertAxis
from lightning_moevlm.training.actions.action import Action, StepFacts, Training
from lightning_moevlm.training.optim.named_parts import is_frozen


@dataclass(frozen=True)
class ReviveDeadExperts:
    """Restarts experts without tokens as noisy copies of busy ones.

    Args:
        idle_steps: optimiser steps in a row without a chosen token, on any rank, that make an expert dead.
        noise: std of the noise, in units of the std of what is copied.
        every_n_steps: optimiser steps between checks; at each the host waits for the device once.

    Raises:
        UserError: a value outside its range.
    """

    idle_steps: int = 100
    noise: float = 0.1
    every_n_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("idle_steps", "every_n_steps"):
            check_number(f"actions.revive_dead_experts.{name}", getattr(self, name), least=1, advice=" optimiser steps")
        check_number(
            "actions.revive_dead_experts.noise",
            self.noise,
            above=0,
            advice="; an exact copy would win no token from its original",
        )

    def check(self, backbone: Backbone) -> None:
        """Refuse routers whose experts cannot die, or cannot be revived.

        Raises:
            UserError: a router that gives all experts the same work, or has no learned row per expert; no layer whose
                router and experts are trained.
        """
        mixtures = [module for module in backbone.modules() if isinstance(module, Mixture)]
        layers = [module for module in mixtures if isinstance(module, MoEFFN)]
        if len(layers) < len(mixtures):
            raise UserError(
                f"actions.revive_dead_experts copies experts of ours, and those of {type(backbone).__name__} belong to "
                "transformers: set actions.revive_dead_experts to null"
            )
        for module in layers:
            if module.router.never_starves:
                raise UserError(
                    f"actions.revive_dead_experts has no effect with {type(module.router).__name__}, which gives every "
                    "expert the same work, so none dies: set actions.revive_dead_experts to null"
                )
            if not module.router.per_expert():
                raise UserError(
                    f"actions.revive_dead_experts cannot act with {type(module.router).__name__}, which has no learned "
                    "row per expert to copy, so a revived expert would get no token: set actions.revive_dead_experts "
                    "to null, or choose a learned router"
                )
        if layers and all(is_frozen(layer.router) or is_frozen(layer.experts) for layer in layers):
            raise UserError(
                "actions.revive_dead_experts cannot act, because model.trainable keeps routers or experts still: set "
                "actions.revive_dead_experts to null, or name both in model.trainable"
            )


class ExpertReviver(Action):
    """Counts idle steps and restarts experts.

    Args:
        options: when and how.
        last_step: last step before routers are frozen, when nothing can be revived; None for never.
    """

    needs = frozenset({"load"})

    def __init__(self, options: ReviveDeadExperts, last_step: int | None = None) -> None:
        self._options = options
        self._last_step = last_step
        self._idle: dict[str, Tensor] = {}  # by layer, int64 (E), on the device

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Count idle steps; at a check, restart dead experts."""
        for path, load_AE in facts.load.items():
            load_E = _load_of_stack(training, path, load_AE)
            idle_E = self._idle.get(path, torch.zeros_like(load_E)).to(load_E.device)
            # a layer without any token (its modality was not in the batch) says nothing about its experts
            counted_E = torch.where(load_E > 0, 0, idle_E + (load_E.sum() > 0))
            self._idle[path] = facts.unless_skipped(counted_E, idle_E)
        if facts.step % self._options.every_n_steps or (self._last_step is not None and facts.step > self._last_step):
            return {}
        dead = {path: idle_E >= self._options.idle_steps for path, idle_E in self._idle.items()}
        if not dead or not bool(torch.cat(list(dead.values())).any()):
            return {}
        events: dict[str, float] = {}
        for path, dead_E in dead.items():
            revived = self._revive(training, facts, path, dead_E.nonzero().squeeze(-1).tolist())
            if revived:
                events[metric_keys.REVIVED_EXPERTS.key(layer=path)] = float(revived)
        return events

    def state_dict(self) -> dict[str, Any]:
        """Return the idle steps of every expert."""
        return {"idle": dict(self._idle)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the counts."""
        self._idle = dict(state["idle"])

    def _revive(self, training: Training, facts: StepFacts, path: str, dead: Sequence[int]) -> int:
        layer = training.backbone.get_submodule(path)
        assert isinstance(layer, MoEFFN)
        if is_frozen(layer.router) or is_frozen(layer.experts):
            return 0
        load_E = _load_of_stack(training, path, facts.load[path])
        busy = load_E.argsort(descending=True, stable=True)[: int((load_E > 0).sum())].tolist()
        if not busy:
            return 0
        generator = torch.Generator().manual_seed(derive_seed(training.seed, "revive", facts.step, path))
        for position, expert in enumerate(dead):
            copy_expert(layer, busy[position % len(busy)], expert, self._options.noise, generator, training.optimizers)
            self._idle[path][expert] = 0
        return len(dead)


def _load_of_stack(training: Training, path: str, load_AE: Tensor) -> Tensor:
    """Return the load of the experts that have weights, int64 (E): free ones come after them."""
    layer = training.backbone.get_submodule(path)
    assert isinstance(layer, MoEFFN)
    return load_AE[:, : layer.num_experts].sum(dim=0)


@torch.no_grad()
def copy_expert(
    layer: MoEFFN,
    source: int,
    target: int,
    noise: float,
    generator: torch.Generator,
    optimizers: Iterable[Optimizer],
) -> None:
    """Make an expert and its router row a noisy copy of another, with empty optimiser state; buffers exactly."""
    optimizers = list(optimizers)
    for tensor, axis in (*(ExpertAxis(stack, 0) for stack in layer.experts.stacks()), *layer.router.per_expert()):
        copied = tensor.select(axis, source).clone()
        if isinstance(tensor, nn.Parameter):
            draw = torch.randn(copied.shape, generator=generator, dtype=torch.float32).to(copied.device)
            copied += (noise * copied.float().std(correction=0) * draw).to(copied.dtype)
            clear_state(tensor, axis, target, optimizers)
        tensor.select(axis, target).copy_(copied)


def clear_state(parameter: nn.Parameter, axis: int, expert: int, optimizers: Iterable[Optimizer]) -> None:
    """Set an expert's slice to zero in all optimiser state that has the parameter's axis of experts."""
    for optimizer in optimizers:
        if parameter not in optimizer.state:
            continue
        for value in optimizer.state[parameter].values():
            is_like = isinstance(value, Tensor) and value.ndim == parameter.ndim
            if is_like and value.shape[axis] == parameter.shape[axis]:
                value.select(axis, expert).zero_()
