"""Refuses a checkpoint whose optimiser state belongs to another model or optimiser."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.optim import parameter_groups
from lightning_moevlm.training.optim.tensor_roles import Role, is_stack


def refuse_other_groups(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse optimiser state whose parameter groups differ from the model's."""
    here = [(group["role"], len(group["params"])) for group in parameter_groups(module.named_parameters())]
    for state in checkpoint.get("optimizer_states", []):
        saved = [(group.get("role"), len(group["params"])) for group in state["param_groups"]]
        if saved != here:
            then, now = (", ".join(f"{role} {count}" for role, count in groups) for groups in (saved, here))
            raise UserError(
                f"the checkpoint cannot be resumed: its optimiser has the parameter groups {then}, this model "
                f"{now}; it is from an older version or another model: resume with the version and the configuration "
                "that saved it, or begin a new run"
            )


def refuse_other_state(checkpoint: Mapping[str, Any], build: Callable[[Iterable[Any]], Optimizer]) -> None:
    """Refuse the state of another kind of optimiser.

    The names of this optimiser's state are found by a trial step for each parameter group.

    Args:
        checkpoint: with the same parameter groups.
        build: factory (parameter groups) -> Optimizer.
    """
    for state in checkpoint.get("optimizer_states", []):
        for group in state["param_groups"]:
            saved = next((set(state["state"][index]) for index in group["params"] if index in state["state"]), None)
            trial = try_state(build, group["role"])
            if saved is not None and saved != set(trial.state):
                then, now = name_states(saved, trial.state)
                raise UserError(
                    f"the checkpoint cannot be resumed: its optimiser state is {then}, that of "
                    f"{trial.optimizer} is {now}; resume with the optimiser that saved it, or begin a new run"
                )


class TrialState(NamedTuple):
    """The state that an optimiser keeps of a parameter."""

    optimizer: str  # name of its class
    state: Mapping[str, Any]  # of a 2 x 2 matrix, or of a stack of 3


def try_state(build: Callable[[Iterable[Any]], Optimizer], role: Role) -> TrialState:
    """Return what an optimiser keeps of a parameter of some role, by a trial step."""
    weight = nn.Parameter(torch.zeros(3, 2, 2) if is_stack({"role": role}) else torch.zeros(2, 2))
    weight.grad = torch.ones_like(weight)
    optimizer = build([{"params": [weight], "role": role}])
    optimizer.step()
    return TrialState(type(optimizer).__name__, dict(optimizer.state[weight]))


def name_states(*states: Iterable[str]) -> tuple[str, ...]:
    """Return what optimisers keep of a parameter, each as a text."""
    return tuple(", ".join(sorted(names)) or "nothing" for names in states)
