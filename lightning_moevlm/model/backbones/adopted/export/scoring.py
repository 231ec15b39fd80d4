"""Asks whether a router of ours decides as the top-k of scores that transformers, or a small file, can compute.

It is asked on random tokens, and not read from its name: the experts and the weights must be the same.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality, RoutingInput
from lightning_moevlm.model.backbones.adopted.routing.replace import to_dense
from lightning_moevlm.model.routers import Router
from lightning_moevlm.model.routers.scores import Score, score_logits

_NUM_TRIALS = 64
_CLOSE = 1e-4
_WIDE = 20.0  # of the tokens: scores that differ little would not tell the functions apart


class Scoring(NamedTuple):
    """How a router decides.

    rows_ED: fp32. bias_E: fp32, added to the scores in the choice alone; None: there is none.
    score: function of the logits. top_k: K. renormalise: whether weights are divided by their sum.
    """

    rows_ED: Tensor
    bias_E: Tensor | None
    score: Score
    top_k: int
    renormalise: bool


@torch.no_grad()
def find_scoring(router: Router) -> Scoring | None:
    """Return how a router decides in evaluation; None if it is no such top-k, or not the same for all modalities."""
    twin = copy.deepcopy(router).cpu().float().eval()
    rows_ED, bias_AE = twin.rows(), getattr(twin, "bias_AE", None)
    if rows_ED is None or rows_ED.shape != (router.num_experts, router.dim) or router.mixes or router.reads_identity:
        return None
    sample = torch.Generator("cpu").manual_seed(0)
    tokens_TD = _WIDE * torch.randn(_NUM_TRIALS, rows_ED.shape[1], generator=sample, device="cpu")
    plans_TE: list[Tensor] = []
    for modality in Modality:
        modality_T = torch.full((_NUM_TRIALS,), int(modality), device="cpu")
        plan = twin(RoutingInput(tokens_TD, modality_T, torch.ones_like(modality_T, dtype=torch.bool)))
        plans_TE.append(to_dense(plan))
    rows_ED = rows_ED.detach().clone() / router.gate.temperature
    bias_E = bias_AE[0].clone() if isinstance(bias_AE, Tensor) and bool(bias_AE.any()) else None
    top_k = round(router.experts_per_token)
    scores: tuple[Score, ...] = ("softmax", "sigmoid", "sqrt_softplus")
    for score in scores:
        for renormalise in (True, False) if top_k > 1 else (False,):
            scoring = Scoring(rows_ED, bias_E, score, top_k, renormalise)
            found_TE = _weigh(scoring, tokens_TD)
            if all(torch.allclose(found_TE, plan_TE, rtol=_CLOSE, atol=_CLOSE**2) for plan_TE in plans_TE):
                return scoring
    return None


def _weigh(scoring: Scoring, tokens_TD: Tensor) -> Tensor:
    scores_TE = score_logits(tokens_TD @ scoring.rows_ED.t(), scoring.score)
    steered_TE = scores_TE if scoring.bias_E is None else scores_TE + scoring.bias_E
    expert_TK = steered_TE.topk(scoring.top_k, dim=-1).indices
    weight_TK = scores_TE.gather(-1, expert_TK)
    if scoring.renormalise:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    return torch.zeros_like(scores_TE).scatter(1, expert_TK, weight_TK)
