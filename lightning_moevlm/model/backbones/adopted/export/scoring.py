"""Asks whether a router of ours decides as the top-k of scores that transformers, or a small file, can compute.

It is asked on random tokens, and not read from its name: the experts and the weights must be the same.
"""

import copy
from collections.abc import Collection
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality, RoutingInput
from lightning_moevlm.model.backbones.adopted.routing.replace import to_dense
from lightning_moevlm.model.routers import Router
from lightning_moevlm.model.routers.group_limit import GroupLimit
from lightning_moevlm.model.routers.scores import Score, score_logits

_NUM_TRIALS = 64
_CLOSE = 1e-4
_WIDE = 20.0  # of the tokens: scores that differ little would not tell the functions apart
_SCORES: tuple[Score, ...] = ("softmax", "sigmoid", "sqrt_softplus")


class Scoring(NamedTuple):
    """How a router decides.

    rows_ED: fp32. bias_E: fp32, added to the scores in the choice alone; None: there is none.
    groups: the best of which a token may use alone; None: there are none.
    score: function of the logits that choices are made by. weight_score: that weights are made of.
    top_k: K. renormalise: whether weights are divided by their sum.
    """

    rows_ED: Tensor
    bias_E: Tensor | None
    groups: GroupLimit | None
    score: Score
    weight_score: Score
    top_k: int
    renormalise: bool

    @property
    def is_plain(self) -> bool:
        """Whether it is the top-k of the softmax, without bias and groups."""
        return self.score == self.weight_score == "softmax" and self.bias_E is None and self.groups is None


@torch.no_grad()
def find_scoring(router: Router, modalities: Collection[Modality] = tuple(Modality)) -> Scoring | None:
    """Return how a router decides in evaluation on tokens of some modalities.

    None: it is no such top-k, or not the same for all of them.
    """
    twin = copy.deepcopy(router).cpu().float().eval()
    rows_ED, bias_AE = twin.rows(), getattr(twin, "bias_AE", None)
    if rows_ED is None or rows_ED.shape != (router.num_experts, router.dim) or router.mixes or router.reads_identity:
        return None
    sample = torch.Generator("cpu").manual_seed(0)
    tokens_TD = _WIDE * torch.randn(_NUM_TRIALS, rows_ED.shape[1], generator=sample, device="cpu")
    plans_TE: list[Tensor] = []
    for modality in modalities:
        modality_T = torch.full((_NUM_TRIALS,), int(modality), device="cpu")
        plan = twin(RoutingInput(tokens_TD, modality_T, torch.ones_like(modality_T, dtype=torch.bool)))
        plans_TE.append(to_dense(plan))
    rows_ED = rows_ED.detach().clone() / router.gate.temperature
    bias_E = None
    if isinstance(bias_AE, Tensor):
        own_AE = bias_AE[[int(modality) for modality in modalities]] if len(bias_AE) > 1 else bias_AE
        if bool((own_AE != own_AE[0]).any()):
            return None
        bias_E = own_AE[0].clone() if bool(own_AE.any()) else None
    groups, top_k = getattr(twin, "groups", None), round(router.experts_per_token)
    scores = sorted(product(_SCORES, _SCORES), key=lambda pair: pair[0] != pair[1])  # one function for both at first
    for (score, weight_score), renormalise in product(scores, (True, False) if top_k > 1 else (False,)):
        scoring = Scoring(rows_ED, bias_E, groups, score, weight_score, top_k, renormalise)
        found_TE = _weigh(scoring, tokens_TD)
        if all(torch.allclose(found_TE, plan_TE, rtol=_CLOSE, atol=_CLOSE**2) for plan_TE in plans_TE):
            return scoring
    return None


def _weigh(scoring: Scoring, tokens_TD: Tensor) -> Tensor:
    logits_TE = tokens_TD @ scoring.rows_ED.t()
    steered_TE = score_logits(logits_TE, scoring.score)
    if scoring.bias_E is not None:
        steered_TE = steered_TE + scoring.bias_E
    if scoring.groups is not None:
        steered_TE = scoring.groups.limit_scores(steered_TE)
    expert_TK = steered_TE.topk(scoring.top_k, dim=-1).indices
    weight_TK = score_logits(logits_TE, scoring.weight_score).gather(-1, expert_TK)
    if scoring.renormalise:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    return torch.zeros_like(logits_TE).scatter(1, expert_TK, weight_TK)
