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

Variants, each off by default:

    per head   queries, keys and values of each head are matrices of their own (Kimi K3's per-head Muon, of which only
               notes were read; whether it splits the output projection too is not known, here it does not)
    hybrid     further iterations with 2, -1.5, 0.5, which bring singular values to 1 where the first ones leave them
               between 0.7 and 1.2: 8 of the first and 2 of these in DeepSeek-V4, of which notes were read
    NorMuon    v <- beta v + (1 - beta) mean of o^2 over a neuron's inputs,   o <- o / sqrt(v),   and o scaled to a root
               mean square of 0.2 (arXiv 2510.05491, algorithm 1): neurons move alike. It orthogonalises the momentum
               itself; here it keeps Nesterov's, as plain Muon does
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.training.optim.optimizers.optimizer_step import (
    adamw_step,
    check_rates,
    create_state,
    evaluate,
    select_with_gradients,
)
from lightning_moevlm.training.optim.tensor_roles import is_stack

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_POLISHING = (2.0, -1.5, 0.5)
_SMALLEST_NORM = 1e-7
_SMALLEST_ROOT = 1e-8  # of a neuron's second moment
_RMS = 0.2  # of AdamW's updates


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
        per_head: true orthogonalises each head's queries, keys and values apart; null takes the joined matrix.
        num_polishing: iterations of the hybrid after the first ones, 2 in DeepSeek-V4; null is none.
        neuron_beta: decay of NorMuon's second moment per neuron, 0.95 there; null is plain Muon.

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
        per_head: bool | None = None,
        num_polishing: int | None = None,
        neuron_beta: float | None = None,
    ) -> None:
        check_rates(lr, weight_decay, betas)
        check_number("eps of the optimiser", eps, above=0)
        check_number("momentum of MuonAdamW", momentum, least=0, below=1)
        check_number("num_iterations of MuonAdamW", num_iterations, least=1, advice="; 5 is customary")
        if num_polishing is not None:
            check_number("num_polishing of MuonAdamW", num_polishing, least=1, advice=", or null for none")
        if neuron_beta is not None:
            check_number("neuron_beta of MuonAdamW", neuron_beta, least=0, below=1, advice=", or null for plain Muon")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "num_iterations": num_iterations}
        variants = {"per_head": per_head, "num_polishing": num_polishing, "neuron_beta": neuron_beta}
        super().__init__(params, defaults | {"betas": betas, "eps": eps} | variants)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = evaluate(closure)
        for group in self.param_groups:
            matrices = [p for p in group["params"] if is_matrix(p, group)]
            others = [p for p in group["params"] if not is_matrix(p, group)]
            heads = _heads_of(group) if group.get("per_head") else {}
            self._muon({**group, "params": matrices}, heads)
            adamw_step(self, {**group, "params": others})
        return loss

    def _muon(self, group: dict[str, Any], heads: Mapping[Tensor, int]) -> None:
        params, _ = select_with_gradients(group)
        directions = momentum_directions(self, group)
        if params:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for p, direction in zip(params, directions, strict=True):
            if p in heads:
                direction = direction.unflatten(0, (heads[p], -1))
            levelled = orthogonalise(direction, group["num_iterations"], group.get("num_polishing") or 0)
            scale = _RMS * math.sqrt(max(levelled.shape[-2:]))
            if group.get("neuron_beta") is not None:
                scale = 1.0
                inputs = -2 if is_stack(group) else -1  # (E, in, out) of a stack, (out, in) of all others
                levelled = self._even_out(p, levelled, inputs, group["neuron_beta"])
            p.add_(levelled.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * scale)

    def _even_out(self, p: Tensor, levelled: Tensor, inputs: int, beta: float) -> Tensor:
        state = self.state[p]
        if "neuron_square" not in state:
            state["neuron_square"] = torch.zeros_like(levelled.sum(dim=inputs, keepdim=True), dtype=p.dtype)
        even, square = even_out_neurons(levelled.float(), state["neuron_square"].float(), inputs, beta)
        state["neuron_square"].copy_(square)
        return even


def momentum_directions(optimizer: Optimizer, group: Mapping[str, Any]) -> list[Tensor]:
    """Move the momenta of the parameters that have a gradient, and return Nesterov's directions."""
    params, gradients = select_with_gradients(group)
    if not params:
        return []
    create_state(optimizer, params, "momentum_buffer")
    momenta = [optimizer.state[p]["momentum_buffer"] for p in params]
    torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
    return list(torch._foreach_lerp(gradients, momenta, group["momentum"]))


def muon_directions(optimizer: Optimizer, group: Mapping[str, Any]) -> list[Tensor]:
    """Move the momenta, and return the orthogonalised directions."""
    directions = momentum_directions(optimizer, group)
    return [orthogonalise(direction, group["num_iterations"]) for direction in directions]


def even_out_neurons(levelled: Tensor, square: Tensor, inputs: int, beta: float) -> tuple[Tensor, Tensor]:
    """Divide each neuron's direction by the root of its second moment; the root mean square of a matrix becomes 0.2.

    Args:
        levelled: orthogonalised, (..., m, n).
        square: second moments before, of size 1 along `inputs`.
        inputs: the axis along which a neuron has its inputs, -1 or -2.
        beta: decay of the moments.

    Returns:
        The direction, and the second moments.
    """
    square = square.lerp(levelled.square().mean(dim=inputs, keepdim=True), 1 - beta)
    even = levelled / (square.sqrt() + _SMALLEST_ROOT)
    size = torch.linalg.matrix_norm(even, keepdim=True).clamp(min=_SMALLEST_NORM)
    return even * (_RMS * math.sqrt(even.shape[-2] * even.shape[-1]) / size), square


def orthogonalise(matrices: Tensor, num_iterations: int = 5, num_polishing: int = 0) -> Tensor:
    """Return the matrix, or each matrix of a stack, with its singular values driven to about 1 (0.7 to 1.2).

    Args:
        matrices: (in, out) or (E, in, out).
        num_iterations: of the quintic Newton-Schulz iteration x <- a x + (b A + c A^2) x with A = x x^T.
        num_polishing: further ones with the coefficients of the hybrid; singular values end within a hundredth of 1.

    Returns:
        The same shape; bf16 on CUDA, fp32 elsewhere. A matrix of zeros stays one.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT  # the smaller Gram matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_SMALLEST_NORM)
    for a, b, c in (_COEFFICIENTS,) * num_iterations + (_POLISHING,) * num_polishing:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


def is_matrix(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether a parameter is a matrix of the trunk or a stack of them; without roles, one with two axes."""
    if "role" not in group:
        return parameter.ndim == 2
    return is_stack(group) or group["role"] == "matrix"


def _heads_of(group: Mapping[str, Any]) -> dict[Tensor, int]:
    """Return the number of matrices that lie one below the other in a parameter, where it is more than one."""
    parts = group.get("parts", ())
    return {p: count for p, count in zip(group["params"], parts, strict=False) if count > 1}
