"""Puts one of our routers where a model has its own, with its weights where both decide alike.

Whether they do is asked, not read from names: copies of both with the same random rows and bias route the same random
tokens. If the experts are the same and the weights proportional, the rows and the bias are carried over, and the factor
between the weights (`routed_scaling_factor` in DeepSeek-V3) is kept. Otherwise our router starts anew.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.model.backbones.adopted.routing.seam import Seam, ask, random_copy
from lightning_moevlm.model.initial_weights import defer_initialisation
from lightning_moevlm.model.routers import Router

_NUM_TRIALS = 64
_CLOSE = 1e-4
_NUM_RESULTS = 3


class Replacement(NamedTuple):
    """A router in place of another.

    carries: whether it decides as the other did, and takes its weights.
    factor: of its combine weights.
    """

    router: Router
    carries: bool
    factor: float


def replace_router(theirs: nn.Module, seam: Seam, block: nn.Module, make: Callable[[int, int], Router]) -> Replacement:
    """Return one of ours in place of theirs; `carry` gives it their weights.

    Raises:
        UserError: a router that makes no plan of pairs, or reads more than tokens, or a block that takes more of it.
    """
    gate = seam.gate
    with defer_initialisation():
        router = make(gate.dim, gate.num_experts)
    router.set_free(0)
    name = type(router).__name__
    if router.mixes:
        raise UserError(f"model.backbone.router {name} mixes tokens and chooses no experts: choose TopKRouter, or null")
    if router.reads_identity:
        raise UserError(
            f"model.backbone.router {name} reads token ids, which adopted models do not pass: choose another"
        )
    if router.num_experts != gate.num_experts:
        raise UserError(f"model.backbone.router {name} has {router.num_experts} experts, the model {gate.num_experts}")
    with defer_initialisation(), torch.device("cpu"):  # the model itself may have shapes alone
        twin = make(gate.dim, gate.num_experts).float().eval()
    trial = random_copy(theirs)
    sample = torch.Generator("cpu").manual_seed(1)
    tokens_TD = torch.randn(_NUM_TRIALS, gate.dim, generator=sample, device="cpu")
    for bias in biases_of(trial, gate.num_experts):
        bias.data.copy_(torch.randn(bias.shape, generator=sample, device="cpu") / 10)
    answer = ask(trial, block, tokens_TD)
    assert not isinstance(answer, str), "it was asked before"
    if len(answer) > _NUM_RESULTS:
        raise UserError(
            f"{type(block).__name__} takes {len(answer)} results of its router, and a router of ours gives logits, "
            "weights and experts: set model.backbone.router to null, or choose another family"
        )
    carries = carry(trial, twin)
    factor = 1.0
    if carries:
        factor_or_none = compare(twin, tokens_TD, answer[gate.indices], answer[gate.weights])
        carries, factor = factor_or_none is not None, factor_or_none or 1.0
    if not carries and gate.sum is not None:
        factor = gate.sum / _sum(twin, tokens_TD)
    router.keeps_weights = carries  # type: ignore[assignment]  # see `initialise`
    return Replacement(router, carries, factor)


@torch.no_grad()
def carry(theirs: nn.Module, router: nn.Module) -> bool:
    """Give a router the rows of another, and its bias; False if one of them has no such parts."""
    rows = router.rows() if isinstance(router, Router) else None
    if rows is None:
        return False
    like = like_rows(theirs, rows)
    if like is None:
        return False
    theirs_bias, ours = biases_of(theirs, len(rows)), getattr(router, "bias_AE", None)
    if len(theirs_bias) > 1 or (theirs_bias and not isinstance(ours, Tensor)):
        return False
    rows.copy_(like)
    if isinstance(ours, Tensor):  # a bias that they do not have begins at 0
        ours.copy_(theirs_bias[0].reshape(1, -1).expand_as(ours)) if theirs_bias else ours.zero_()
    return True


def like_rows(theirs: nn.Module, rows: Tensor) -> Tensor | None:
    """Return a router's parameter that is its rows; None if it is not one alone, or another matrix decides too."""
    like = [parameter for parameter in theirs.parameters() if parameter.shape == rows.shape]
    rest = [p for p in theirs.parameters() if p.ndim > 1 and p.shape != rows.shape and p.numel() != len(rows)]
    return None if len(like) != 1 or rest else like[0]


def biases_of(theirs: nn.Module, num_experts: int) -> list[Tensor]:
    """Return a router's biases and those that balance it."""
    tensors = (*theirs.named_parameters(), *theirs.named_buffers())
    return [tensor for name, tensor in tensors if name.endswith("bias") and tensor.numel() == num_experts]


def _plan(router: Router, tokens_TD: Tensor) -> PairPlan:
    text_T = torch.full((len(tokens_TD),), int(Modality.TEXT), device="cpu")
    with torch.no_grad():
        plan = router(RoutingInput(tokens_TD, text_T, torch.ones_like(text_T, dtype=torch.bool)))
    assert isinstance(plan, PairPlan), "it mixes nothing"
    return plan


def to_dense(plan: PairPlan) -> Tensor:
    """Return the weight of each expert for each token, (T, E)."""
    weight_N = torch.where(plan.chosen_N, plan.weight_N, 0.0)
    flat = plan.token_N * plan.num_experts + plan.expert_N
    zeros = weight_N.new_zeros(plan.num_tokens * plan.num_experts)
    return zeros.index_add(0, flat, weight_N).view(plan.num_tokens, plan.num_experts)


def compare(router: Router, tokens_TD: Tensor, index: Tensor, weight: Tensor) -> float | None:
    """Return the factor of their weights over ours; None if the experts differ, or it is not constant."""
    ours_TE = to_dense(_plan(router, tokens_TD))
    theirs_TE = torch.zeros_like(ours_TE).scatter(
        1, index.reshape(len(tokens_TD), -1).long(), weight.reshape(len(tokens_TD), -1).float()
    )
    if not torch.equal(ours_TE > 0, theirs_TE > 0):
        return None
    ratio = theirs_TE[theirs_TE > 0] / ours_TE[theirs_TE > 0]
    if bool((ratio / ratio[0] - 1).abs().max() > _CLOSE):
        return None
    factor = float(ratio.median())
    return 1.0 if abs(factor - 1) < _CLOSE else round(factor, 6)


def _sum(router: Router, tokens_TD: Tensor) -> float:
    """Return the sum of a token's weights, if that of all tokens is equal, else 1."""
    with torch.no_grad():
        rows = router.rows()
        if rows is not None:
            rows.copy_(torch.randn(rows.shape, generator=torch.Generator("cpu").manual_seed(2), device="cpu"))
    total_T = to_dense(_plan(router, tokens_TD)).sum(dim=1)
    is_constant = bool((total_T - total_T[0]).abs().max() <= _CLOSE * total_T[0].abs())
    return float(total_T[0]) if is_constant and bool(total_T[0] > 0) else 1.0
