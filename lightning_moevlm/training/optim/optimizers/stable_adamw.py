"""StableAdamW: AdamW whose step shrinks, tensor by tensor, if the second moment lags behind the gradient.

    m, u    AdamW's moments, bias-corrected
    rms     sqrt(mean over the tensor of g^2 / max(u, eps^2)):  about 1 while u is a fair estimate of g^2
    rate    lr / max(1, rms / threshold)
    p <- (1 - rate wd) p - rate m / (sqrt(u) + eps)

Wortsman et al., arXiv 2304.13013, section 3 and algorithm 2: loss spikes follow one to eight steps after rms jumps, and
this clipping (Adafactor's, arXiv 1804.04235, section 6) removes them where clipping the gradient does not. Weight
decay takes the shrunk rate too, as in the algorithm. A stack of experts is clipped expert by expert.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.training.optim.optimizers.optimizer_step import (
    check_rates,
    evaluate,
    move_adam_moments,
)
from lightning_moevlm.training.optim.tensor_roles import is_stack, root_mean_squares


class StableAdamW(Optimizer):
    """AdamW with update clipping per tensor.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, by the shrunk rate.
        threshold: root mean square of g / sqrt(u) above which the step shrinks.

    Raises:
        UserError: a negative rate, a beta outside 0 to 1, or a threshold of 0 or less.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        threshold: float = 1.0,
    ) -> None:
        check_rates(lr, weight_decay, betas)
        check_number("eps of the optimiser", eps, above=0)
        check_number("threshold of StableAdamW", threshold, above=0, advice="; the paper's is 1")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "threshold": threshold}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = evaluate(closure)
        for group in self.param_groups:
            params, gradients, steps, means, squares = move_adam_moments(self, group)
            if not params:
                continue
            beta1, beta2 = group["betas"]
            roots = torch._foreach_div(squares, _bias_corrections(beta2, steps))
            torch._foreach_sqrt_(roots)
            relative = torch._foreach_div(gradients, torch._foreach_clamp_min(roots, group["eps"]))
            rates = [
                group["lr"] / (rms / group["threshold"]).clamp(min=1.0)
                for rms in root_mean_squares(relative, is_stack(group))
            ]
            torch._foreach_add_(roots, group["eps"])
            updates = torch._foreach_div(means, roots)
            torch._foreach_div_(updates, _bias_corrections(beta1, steps))
            for p, update, rate in zip(params, updates, rates, strict=True):
                p.mul_(1 - rate * group["weight_decay"]).sub_(update.mul_(rate))
        return loss


def _bias_corrections(beta: float, steps: list[Tensor]) -> tuple[Tensor, ...]:
    """Return 1 - beta^step of each parameter."""
    powers = torch._foreach_pow(beta, steps)
    torch._foreach_neg_(powers)
    torch._foreach_add_(powers, 1)
    return powers
