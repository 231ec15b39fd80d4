"""SeqTopK: a budget of experts for each sequence instead of each token, so that hard tokens get more than easy ones.

    p = softmax(logits),   of a sequence of T tokens the T k pairs (token, expert) with the largest p are used

Route experts by sequence, not by token (arXiv 2511.06494); the paper itself could not be read, the rule and the cap per
token are as a port for Megatron-LM has them. A token may get no expert at all. The tokens of a sequence compete, so
it is not causal; the paper's decoding with a cache of scores is not built. Samples do not compete.
"""

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import check_renormalise, check_top_k, make_plan, renormalise_weights
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.router import LinearRouter


class SequenceTopKRouter(LinearRouter):
    """The best pairs of each sequence.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: experts per token on average, over each sequence.
        max_k: most experts of one token, at least top_k; null is E.
        renormalise: divide a token's weights by their sum. Needs top_k >= 2, see `TopKRouter`.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: top_k or max_k outside its range, or renormalise with top_k = 1.
    """

    competes = True
    choices_vary = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        max_k: int | None = None,
        renormalise: bool = False,
        gate: Gate = Gate(),
    ) -> None:
        super().__init__(dim, num_experts, gate)
        max_k = num_experts if max_k is None else max_k
        check_top_k(max_k, num_experts, key="max_k")
        check_top_k(top_k, max_k, limit="max_k" if max_k < num_experts else "num_experts")
        check_renormalise(renormalise, top_k)
        self.top_k = top_k
        self.max_k = max_k
        self.renormalise = renormalise

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to 0 to max_k experts each, K on average."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        probs_TE = logits_TE.softmax(dim=-1)
        weight_TK, expert_TK = probs_TE.topk(self.max_k, dim=-1)
        chosen_TK = take_best_pairs(weight_TK.detach(), inputs.valid_T, inputs.num_sequences, self.top_k)
        if self.renormalise:
            weight_TK = renormalise_weights(weight_TK * chosen_TK)
        return make_plan(inputs, logits_TE, probs_TE, expert_TK, weight_TK, chosen_TK)


def take_best_pairs(score_TK: Tensor, valid_T: Tensor, num_sequences: int, top_k: int) -> Tensor:
    """Return which pairs are among the best of their sequence, top_k per valid token: bool (T, K); padding has none.

    score_TK: of each token's best experts, at least top_k of them. Of equal scores earlier tokens come first.
    """
    length = score_TK.shape[0] // num_sequences
    liked_BN = score_TK.masked_fill(~valid_T.unsqueeze(-1), -torch.inf).view(num_sequences, length * score_TK.shape[1])
    rank_BN = liked_BN.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
    budget_B1 = top_k * valid_T.view(num_sequences, length).sum(dim=-1, keepdim=True)
    return (rank_BN < budget_B1).view(score_TK.shape)
