"""Scores with loss-free balancing: a bias steers the choice of experts, not their weights.

    s = sigmoid(x W^T),   experts = top-k(s + b),   weight_e = s_e (divided by the sum of the chosen s)
    after each optimiser step:  b += u * sign(mean load - load)      or  b += u * (mean load - load) / mean load
                                or  b += momentum of a soft clamp (`smebu`)   or  b is solved for (`quantile_update`)

Auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1), used by DeepSeek-V3 (arXiv 2412.19437).
The bias is a buffer: it is in the checkpoint, takes no gradient and no weight decay. It moves on the counts of the
step before, so no token sees the future. Only differences of b matter; recentring keeps their mean at 0. With a bias
per modality, each modality's load is evened out on its own, as LIMoE's losses do (arXiv 2206.02770, section 2.2).
Where some experts are free (`MoEFFN.free`) only the others' biases move, each towards k' / (k (E - free)) of the pairs:
k' = target_k of the k experts of a token compute then, on average. With the proportional update this is LongCat-Flash's
controller (arXiv 2509.01322, section 2: delta b = mu (K_e / (K N) - T_i / (K T)), its K_e is target_k).
With `groups` the top-k is among the experts of a token's best groups, by s + b, as in DeepSeek-V3. The sigmoid may be
another score function (`scores`), and weights may have a score of their own.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import check_top_k, choose_experts, make_plan, renormalise_weights
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.group_limit import GroupLimit
from lightning_moevlm.model.routers.quantile_update import QuantileUpdate, count_required_bias, solve_bias
from lightning_moevlm.model.routers.router import LinearRouter
from lightning_moevlm.model.routers.scores import Score, score_logits
from lightning_moevlm.model.routers.smebu import SMEBU, next_momentum


class SigmoidBiasRouter(LinearRouter):
    """Top-k of sigmoid or other scores, balanced by a bias.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: experts per token.
        renormalise: divide the chosen weights by their sum; switched off with top_k 1, where it would cut the gradient.
        update_rate: u, 0 switches balancing off; 1e-3 in the papers, 5e-4 with SMEBU. QuantileUpdate has no rate.
        update: by the sign of the imbalance, in proportion to it, by SMEBU, or by QuantileUpdate, which solves for the
            bias.
        recentre: keep the mean of the bias at 0.
        per_modality: one bias for each modality, moved by that modality's load alone.
        groups: limit a token to the experts of its best groups; null: all experts.
        score: function of the logits that choices are made by; null is the sigmoid.
        weight_score: function of the logits that weights are made of; null is that of the choice.
        target_k: with free experts, how many others a token uses on average, below top_k; null steers to equal loads.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: top_k outside 1..E, a negative update_rate, groups or target_k that do not fit, QuantileUpdate where
            no expert is left to compete for a place, with groups, or with scores above 1, or SMEBU or QuantileUpdate
            with free experts.
    """

    takes_choices = True
    bias_AE: Tensor
    momentum_AE: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        renormalise: bool = True,
        update_rate: float = 1e-3,
        update: Literal["sign", "proportional"] | SMEBU | QuantileUpdate = "sign",
        recentre: bool = True,
        per_modality: bool = False,
        groups: GroupLimit | None = None,
        score: Literal["softmax", "sqrt_softplus"] | None = None,
        weight_score: Score | None = None,
        target_k: float | None = None,
        gate: Gate = Gate(),
    ) -> None:
        super().__init__(dim, num_experts, gate)
        check_top_k(top_k, num_experts)
        if groups is not None:
            groups.check(num_experts, top_k)
        check_number("update_rate", update_rate, least=0, advice="; 1e-3 in the papers, 0 switches balancing off")
        if target_k is not None:
            check_number("target_k", target_k, above=0, below=top_k, advice=", the top_k")
        self.top_k = top_k
        self.renormalise = renormalise and top_k > 1
        self.update_rate = update_rate
        self.update = update
        self.recentre = recentre
        self.per_modality = per_modality
        self.groups = groups
        self.score: Score = score or "sigmoid"
        self.weight_score: Score = weight_score or self.score
        self.target_k = target_k
        rows = len(Modality) if per_modality else 1
        self.register_buffer("bias_AE", torch.zeros(rows, num_experts, dtype=torch.float32))
        if isinstance(update, SMEBU):
            self.register_buffer("momentum_AE", torch.zeros(rows, num_experts, dtype=torch.float32))
        if isinstance(update, QuantileUpdate):
            self._check_quantiles()
            self.tally_size = rows * num_experts * update.num_bins

    @property
    def computing_per_token(self) -> float:
        """target_k, which the bias steers to; without it as of equal loads."""
        return super().computing_per_token if self.target_k is None else self.target_k

    def set_free(self, num_free: int) -> None:
        """Leave the bias of the last experts alone.

        Raises:
            UserError: target_k without free experts, or an update that knows no free experts.
        """
        super().set_free(num_free)
        if self.target_k is not None and not num_free:
            raise UserError(
                "router.target_k steers how many choices are not free, and no expert is: set router.target_k to null, "
                "or moe.free, which models of transformers lack"
            )
        if num_free and not isinstance(self.update, str):
            raise UserError(
                f"router.update {type(self.update).__name__} makes the loads of all experts equal, free ones too: "
                "choose proportional or sign, or set moe.free to null"
            )

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens; probs_TE are the scores divided by their sum, so that losses see a distribution."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        scores_TE = score_logits(logits_TE, self.score)
        bias_TE = self.bias_AE.float()[inputs.modality_T if self.per_modality else 0]
        steered_TE = scores_TE.detach() + bias_TE
        if self.groups is not None:
            steered_TE = self.groups.limit_scores(steered_TE)
        expert_TK = choose_experts(steered_TE, self.top_k, inputs)
        weights_TE = scores_TE if self.weight_score == self.score else score_logits(logits_TE, self.weight_score)
        weight_TK = weights_TE.gather(-1, expert_TK)
        if self.renormalise:
            weight_TK = renormalise_weights(weight_TK)
        return make_plan(inputs, logits_TE, renormalise_weights(scores_TE), expert_TK, weight_TK)

    @torch.no_grad()
    def tally(self, plan: PairPlan) -> Tensor:
        """Return the histogram that QuantileUpdate solves for the bias."""
        if not isinstance(self.update, QuantileUpdate):
            return super().tally(plan)
        row_T = plan.modality_T if self.per_modality else torch.zeros_like(plan.modality_T)
        scores_TE, num_bins = score_logits(plan.logits_TE, self.score), self.update.num_bins
        bias_AE = self.bias_AE.float()
        return count_required_bias(scores_TE, bias_AE, row_T, plan.valid_T, self.top_k, num_bins).flatten()

    @torch.no_grad()
    def rebalance(self, load_AE: Tensor, tally: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower that of the others; no load, no change."""
        if self.update_rate == 0:
            return
        load_AE = (load_AE if self.per_modality else load_AE.sum(dim=0, keepdim=True)).float()
        if isinstance(self.update, QuantileUpdate):
            histogram_AEN = tally.view(*self.bias_AE.shape, self.update.num_bins)
            bias_AE = self.bias_AE.float()
            solved_AE = solve_bias(histogram_AEN, bias_AE, self.top_k / self.num_experts)
            self.bias_AE.copy_(bias_AE.lerp(solved_AE, 1 - self.update.memory))
        elif isinstance(self.update, SMEBU):
            momentum_AE = next_momentum(load_AE, self.momentum_AE.float(), self.update_rate, self.update)
            seen_A1 = load_AE.sum(dim=1, keepdim=True) > 0
            self.momentum_AE.copy_(torch.where(seen_A1, momentum_AE, self.momentum_AE.float()))
            self.bias_AE += momentum_AE * seen_A1
        else:
            aim_A1 = load_AE.mean(dim=1, keepdim=True)
            if self.target_k is not None:
                num_others = self.num_experts - self.num_free
                aim_A1 = load_AE.sum(dim=1, keepdim=True) * (self.target_k / (self.top_k * num_others))
            shortfall_AE = aim_A1 - load_AE
            direction_AE = shortfall_AE.sign() if self.update == "sign" else shortfall_AE / aim_A1.clamp(min=1)
            direction_AE[:, self.num_experts - self.num_free :] = 0
            self.bias_AE += self.update_rate * direction_AE
        if self.recentre:
            self.bias_AE -= self.bias_AE.mean(dim=1, keepdim=True)

    def _check_quantiles(self) -> None:
        """Refuse what a bias cannot be solved for.

        Raises:
            UserError: with what to change.
        """
        if self.top_k == self.num_experts:
            raise UserError(
                f"router.update QuantileUpdate balances experts that compete, and with router.top_k {self.top_k} of "
                f"{self.num_experts} every token gets all: choose a smaller top_k, or router.update sign"
            )
        if self.groups is not None:
            raise UserError(
                "router.update QuantileUpdate does not know how groups cut off experts: set router.groups to null, or "
                "router.update to sign"
            )
        if self.score == "sqrt_softplus":
            raise UserError(
                "router.update QuantileUpdate counts scores from 0 to 1, and router.score sqrt_softplus has no upper "
                "end: choose softmax, null for the sigmoid, or router.update sign"
            )
