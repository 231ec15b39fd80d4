"""Hyperball: matrices keep their initial size and turn by a fixed angle per step, in place of weight decay.

    u  = update of Adam, or of Muon                           a = lr x matrix_lr_multiplier
    W <- R normalise(W - a R normalise(u)),                   R = Frobenius norm of the first W

Wen et al., arXiv 2606.16899; the rule was read in the authors' article (whenwen.github.io, from weight decay to
hyperball optimization, part 1), not in the paper. Weight decay sets the size of weights, and with it the angle of a
step, only in the long run; here both are set. All matrices of the trunk and expert stacks are held, expert by expert.
Embeddings, the patch projection, heads, norms, biases and routers go to AdamW, as there.

A matrix that is 0 has no direction: it takes a plain step, and its size after that is kept.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.training.optim.optimizers.muon import is_matrix, muon_directions
from lightning_moevlm.training.optim.optimizers.optimizer_step import (
    adam_directions,
    adamw_step,
    check_rates,
    evaluate,
    select_with_gradients,
)

_SMALLEST_NORM = 1e-12


class Hyperball(Optimizer):
    """Adam or Muon on spheres for matrices and expert stacks, AdamW on the rest.

    Parameters without a role (no `parameter_groups`) are held if they have two axes.

    Args:
        params: parameters, or groups of them.
        lr: learning rate of the rest.
        base: whose update turns the matrices.
        matrix_lr_multiplier: angle of a step of the matrices, in radians, in units of lr.
        weight_decay: decoupled, of the rest alone.
        momentum: of Muon.
        num_iterations: Newton-Schulz iterations of Muon.
        betas: of Adam and AdamW.
        eps: of Adam and AdamW.

    Raises:
        UserError: a negative rate, a beta or momentum outside 0 to 1, or no iteration.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        base: Literal["adam", "muon"] = "muon",
        matrix_lr_multiplier: float = 1.0,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        num_iterations: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        check_rates(lr, weight_decay, betas)
        check_number("eps of the optimiser", eps, above=0)
        check_number("matrix_lr_multiplier of Hyperball", matrix_lr_multiplier, above=0)
        check_number("momentum of Hyperball", momentum, least=0, below=1)
        check_number("num_iterations of Hyperball", num_iterations, least=1, advice="; 5 is customary")
        of_matrices = {"base": base, "matrix_lr_multiplier": matrix_lr_multiplier}
        of_muon = {"momentum": momentum, "num_iterations": num_iterations}
        of_adam = {"betas": betas, "eps": eps}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay} | of_matrices | of_muon | of_adam)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = evaluate(closure)
        for group in self.param_groups:
            matrices = [p for p in group["params"] if is_matrix(p, group)]
            self._turn({**group, "params": matrices})
            adamw_step(self, {**group, "params": [p for p in group["params"] if not is_matrix(p, group)]})
        return loss

    def _turn(self, group: dict[str, Any]) -> None:
        params, _ = select_with_gradients(group)
        updates = (adam_directions if group["base"] == "adam" else muon_directions)(self, group)
        for p, update in zip(params, updates, strict=True):
            state = self.state[p]
            if "radius" not in state:  # without the parameter's axes: an expert that is revived keeps it
                state["radius"] = torch.zeros(p.shape[:-2], dtype=p.dtype, device=p.device)
            turned, radius = turn(p, update, state["radius"], group["lr"] * group["matrix_lr_multiplier"])
            p.copy_(turned)
            state["radius"].copy_(radius)


def turn(matrix: Tensor, update: Tensor, radius: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    """Turn a matrix, or each matrix of a stack, against its update.

    Args:
        matrix: (..., in, out).
        update: the same shape, of any size.
        radius: (...), the size that is kept; 0 takes that of the matrix.
        angle: in radians, for small ones.

    Returns:
        The matrix in fp32, and its radius; 0 if it is 0.
    """
    matrix, update = matrix.float(), update.float()
    radius = torch.where(radius > 0, radius.float(), _norm(matrix))
    length = torch.where(radius > 0, radius / _norm(update).clamp(min=_SMALLEST_NORM), 1.0)
    moved = matrix - (angle * length)[..., None, None] * update
    size = torch.where(radius > 0, radius / _norm(moved).clamp(min=_SMALLEST_NORM), 1.0)
    return moved * size[..., None, None], radius


def _norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix)
