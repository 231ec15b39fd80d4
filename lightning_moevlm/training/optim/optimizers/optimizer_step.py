"""Common beginnings of optimiser steps, and checks of their options."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number


def evaluate(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """Run the closure, which computes gradients, with gradients on."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def select_with_gradients(group: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters of a group that have a gradient, and the gradients."""
    params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params if p.grad is not None]


def check_rates(lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
    """Refuse negative rates and decays, and betas outside 0 to 1.

    Raises:
        UserError: a negative rate, or a beta outside 0 to 1.
    """
    check_number("lr of the optimiser", lr, least=0)
    check_number("weight_decay of the optimiser", weight_decay, least=0)
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas of the optimiser are {tuple(betas)}: choose two values from 0 up to, not including, 1")
