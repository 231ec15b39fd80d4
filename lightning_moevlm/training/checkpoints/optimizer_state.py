"""Refuses a checkpoint whose optimiser state belongs to another model or optimiser."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.optim import parameter_groups


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

    The names of this optimiser's state are found by a trial step on a 2 x 2 matrix for each parameter group.

    Args:
        checkpoint: with the same parameter groups.
        build: factory (parameter groups) -> Optimizer.
    """
    for state in checkpoint.get("optimizer_states", []):
        for group in state["param_groups"]:
            saved = next((set(state["state"][index]) for index in group["params"] if index in state["state"]), None)
            weight = nn.Parameter(torch.zeros(1, 2, 2) if group["role"] in ("expert", "shared") else torch.zeros(2, 2))
            weight.grad = torch.ones_like(weight)
            optimizer = build([{"params": [weight], "role": group["role"]}])
            optimizer.step()
            here = set(optimizer.state[weight])
            if saved is not None and saved != here:
                then, now = (", ".join(sorted(names)) or "nothing" for names in (saved, here))
                raise UserError(
                    f"the checkpoint cannot be resumed: its optimiser state is {then}, that of "
                    f"{type(optimizer).__name__} is {now}; resume with the optimiser that saved it, or begin a new run"
                )
