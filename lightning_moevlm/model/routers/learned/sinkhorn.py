"""Sinkhorn routing: while training, choices come from a plan whose columns are balanced.

    pi = Sinkhorn(exp(logits)),   training: expert = top-k of pi,   evaluation: top-k of the logits
    weights: softmax (k = 1: sigmoid) of the logits at the chosen experts

S-BASE (Clark et al. 2022, arXiv 2202.01169, appendix B): no balance loss is needed, but training and evaluation
choose differently. Tokens of a batch compete, so it is not causal.
"""

import torch
from torch import Tensor

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import check_top_k, make_plan
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.router import LinearRouter


class SinkhornRouter(LinearRouter):
    """Top-k of a balanced transport plan.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: experts per token.
        num_iterations: of Sinkhorn's alternating normalisation.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: top_k outside 1..E, or no iteration.
    """

    competes = True

    def __init__(
        self, dim: int, num_experts: int, top_k: int = 1, num_iterations: int = 8, gate: Gate = Gate()
    ) -> None:
        super().__init__(dim, num_experts, gate)
        check_top_k(top_k, num_experts)
        check_number("num_iterations", num_iterations, least=1)
        self.top_k = top_k
        self.num_iterations = num_iterations

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K experts each."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        probs_TE = logits_TE.softmax(dim=-1)
        scores_TE = logits_TE.detach()
        if self.training:
            scores_TE = balance_log_plan(scores_TE, inputs.valid_T, self.num_iterations)
        expert_TK = scores_TE.topk(self.top_k, dim=-1).indices
        weights_TE = logits_TE.sigmoid() if self.top_k == 1 else probs_TE
        return make_plan(inputs, logits_TE, probs_TE, expert_TK, weights_TE.gather(-1, expert_TK))


def balance_log_plan(logits_TE: Tensor, valid_T: Tensor, num_iterations: int) -> Tensor:
    """Return the log of a plan whose rows sum to 1 and whose columns sum to (valid tokens / E), nearly.

    Computed in log space; padding has no mass. The last normalisation is over experts, so columns are exact.
    """
    log_plan_TE = logits_TE.masked_fill(~valid_T.unsqueeze(-1), -torch.inf)
    log_share = (valid_T.sum().clamp(min=1).to(logits_TE.dtype) / logits_TE.shape[1]).log()
    for _ in range(num_iterations):
        rows_T1 = log_plan_TE.logsumexp(dim=1, keepdim=True)
        log_plan_TE = log_plan_TE - torch.where(rows_T1.isfinite(), rows_T1, 0.0)
        columns_1E = log_plan_TE.logsumexp(dim=0, keepdim=True)
        log_plan_TE = log_plan_TE - torch.where(columns_1E.isfinite(), columns_1E, 0.0) + log_share
    return log_plan_TE
