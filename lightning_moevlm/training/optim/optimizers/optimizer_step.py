"""Code that all our optimisers share: the beginning of a step, and checks of options."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

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


def create_state(optimizer: Optimizer, params: Iterable[Tensor], *names: str, counts_steps: bool = False) -> None:
    """Create zero state for parameters without any: tensors of their shape and, if asked, a step count.

    The count is on the device, so that a step can be undone there.
    """
    for p in params:
        state = optimizer.state[p]
        if not state:
            if counts_steps:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state.update({name: torch.zeros_like(p) for name in names})


def check_rates(lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
    """Refuse negative rates and decays, and betas outside 0 to 1.

    Raises:
        UserError: a negative rate, or a beta outside 0 to 1.
    """
    check_number("lr of the optimiser", lr, least=0)
    check_number("weight_decay of the optimiser", weight_decay, least=0)
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas of the optimiser are {tuple(betas)}: choose two values from 0 up to, not including, 1")
