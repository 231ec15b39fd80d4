"""Code that all our optimisers share: the beginning of a step, and checks of options."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

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


def adamw_step(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Take a step of torch's AdamW on the parameters of a group that have a gradient."""
    params, gradients = select_with_gradients(group)
    if not params:
        return
    create_state(optimizer, params, "exp_avg", "exp_avg_sq", counts_steps=True)
    adamw(
        params,
        gradients,
        [optimizer.state[p]["exp_avg"] for p in params],
        [optimizer.state[p]["exp_avg_sq"] for p in params],
        [],
        [optimizer.state[p]["step"] for p in params],
        capturable=params[0].is_cuda,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


class AdamMoments(NamedTuple):
    """The parameters of a group that have a gradient, with Adam's state, in one order."""

    params: list[Tensor]
    gradients: list[Tensor]
    steps: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]


def move_adam_moments(optimizer: Optimizer, group: Mapping[str, Any]) -> AdamMoments:
    """Count a step and move both moments, which are not bias-corrected, to the gradient."""
    params, gradients = select_with_gradients(group)
    create_state(optimizer, params, "exp_avg", "exp_avg_sq", counts_steps=True)
    steps, means, squares = ([optimizer.state[p][name] for p in params] for name in ("step", "exp_avg", "exp_avg_sq"))
    if params:
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    return AdamMoments(params, gradients, steps, means, squares)


def adam_directions(optimizer: Optimizer, group: Mapping[str, Any]) -> list[Tensor]:
    """Move Adam's moments and return its directions, m / (sqrt(u) + eps), both bias-corrected."""
    moments = move_adam_moments(optimizer, group)
    beta1, beta2 = group["betas"]
    return [
        mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        for step, mean, square in zip(moments.steps, moments.means, moments.squares, strict=True)
    ]


def check_rates(lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
    """Refuse negative rates and decays, and betas outside 0 to 1.

    Raises:
        UserError: a negative rate, or a beta outside 0 to 1.
    """
    check_number("lr of the optimiser", lr, least=0)
    check_number("weight_decay of the optimiser", weight_decay, least=0)
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas of the optimiser are {tuple(betas)}: choose two values from 0 up to, not including, 1")
