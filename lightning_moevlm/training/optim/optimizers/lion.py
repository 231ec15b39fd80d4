"""Lion: every coordinate moves by the learning rate; momentum decides the sign (Chen et al., arXiv 2302.06675).

    c = beta1 m + (1 - beta1) g
    p <- (1 - lr wd) p - lr sign(c)
    m <- beta2 m + (1 - beta2) g

Half the state of AdamW. Since every coordinate moves in full, the paper takes a learning rate 3 to 10 times smaller
than AdamW's and a weight decay larger by the same factor (section 5).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_moevlm.training.optim.optimizers.optimizer_step import (
    check_rates,
    create_state,
    evaluate,
    select_with_gradients,
)


class Lion(Optimizer):
    """Momentum decides the sign of each coordinate's step, which has the size of the learning rate.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: of the sign, of the momentum.
        weight_decay: decoupled.

    Raises:
        UserError: a negative rate, or a beta outside 0 to 1.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        check_rates(lr, weight_decay, betas)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = evaluate(closure)
        for group in self.param_groups:
            params, gradients = select_with_gradients(group)
            if not params:
                continue
            create_state(self, params, "exp_avg")
            momenta = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            directions = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
        return loss
