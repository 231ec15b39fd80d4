"""Muon for the matrices of the trunk, AdamW for everything else, in one optimiser.

    b <- momentum b + (1 - momentum) g
    o  = orthogonalised (1 - momentum) g + momentum b         (Nesterov), by five Newton-Schulz iterations
    p <- (1 - lr wd) p - lr 0.2 sqrt(max(in, out)) o

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the factor gives o the root mean square of AdamW's updates, so
that one learning rate and one weight decay serve both parts (Moonlight, arXiv 2502.16982, section 2.2).

The rule is that of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which takes only parameters with two axes and
computes in bf16. Here a stack (E, in, out) is E matrices in one batched product, and without CUDA the iteration runs in
fp32, because bf16 products are far slower on most CPUs. Embeddings, the patch projection, heads, norms, biases and
routers go to torch's AdamW.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.training.optim.optimizers.optimizer_step import (
    check_rates,
    create_state,
    evaluate,
    select_with_gradients,
)
from lightning_moevlm.training.optim.tensor_roles import is_stack

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALLEST_NORM = 1e-7


class MuonAdamW(Optimizer):
    """Muon on matrices and expert stacks, AdamW on the rest.

    Parameters without a role (no `parameter_groups`) are orthogonalised if they have two axes.

    Args:
        params: parameters, or groups of them.
        lr: learning rate of both parts.
        weight_decay: decoupled, of both parts.
        momentum: of Muon.
        num_iterations: Newton-Schulz iterations.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        UserError: a negative rate, a beta or momentum outside 0 to 1, or no iteration.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        num_iterations: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        check_rates(lr, weight_decay, betas)
        check_number("eps of the optimiser", eps, above=0)
        check_number("momentum of MuonAdamW", momentum, least=0, below=1)
        check_number("num_iterations of MuonAdamW", num_iterations, least=1, advice="; 5 is customary")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "num_iterations": num_iterations}
        super().__init__(params, defaults | {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = evaluate(closure)
        for group in self.param_groups:
            matrices = [p for p in group["params"] if _is_orthogonalised(p, group)]
            others = [p for p in group["params"] if not _is_orthogonalised(p, group)]
            self._muon({**group, "params": matrices})
            self._adamw({**group, "params": others})
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        params, gradients = select_with_gradients(group)
        if not params:
            return
        create_state(self, params, "momentum_buffer")
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for p, direction in zip(params, directions, strict=True):
            scale = 0.2 * math.sqrt(max(p.shape[-2:]))
            p.add_(orthogonalise(direction, group["num_iterations"]).to(p.dtype), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any]) -> None:
        params, gradients = select_with_gradients(group)
        if not params:
            return
        create_state(self, params, "exp_avg", "exp_avg_sq", counts_steps=True)
        adamw(
            params,
            gradients,
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            capturable=params[0].is_cuda,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Return the matrix, or each matrix of a stack, with its singular values driven to about 1 (0.7 to 1.2).

    Args:
        matrices: (in, out) or (E, in, out).
        num_iterations: of the quintic Newton-Schulz iteration x <- a x + (b A + c A^2) x with A = x x^T.

    Returns:
        The same shape; bf16 on CUDA, fp32 elsewhere. A matrix of zeros stays one.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT  # the smaller Gram matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


def _is_orthogonalised(parameter: Tensor, group: dict[str, Any]) -> bool:
    if "role" not in group:
        return parameter.ndim == 2
    return is_stack(group) or group["role"] == "matrix"
