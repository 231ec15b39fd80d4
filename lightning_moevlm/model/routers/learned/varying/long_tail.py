"""LTDR: more experts for the rare, informative patches of an image, which form the long tail of its tokens.

    p = softmax(logits),   RPV_t = variance of p_t over experts,   a patch is of the tail if its RPV is above their mean
    experts = top-k(p), and top-a(p), a > k, for a patch of the tail;   weights = softmax of the chosen p

Long-tailed distribution-aware router (arXiv 2507.01351v2, section III, equations 9, 11 and 12; the softmax is over
probabilities, as printed). The mean is over the patches of the sample: an image is seen whole, so a causal model may
use it. The paper's other half takes vision out of the balance loss (its equation 10): `losses.load_balance.only: text`.
It uses k 2, a 4 of 4 experts (MoE-LLaVA) and k 8, a 12 of 64 (Molmo).
"""

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import check_top_k, make_plan
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.router import LinearRouter


class LongTailRouter(LinearRouter):
    """Top-k, and more experts for patches of the tail.

    Args:
        dim: model width D.
        num_experts: E, at least 3.
        top_k: experts of text tokens and of common patches, at least 2: the only weight of a token would be 1, and the
            router would get no gradient from it.
        tail_k: experts of a patch of the tail, above top_k; active FLOPs are counted with it, an upper bound.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: top_k or tail_k outside its range.
    """

    choices_vary = True

    def __init__(self, dim: int, num_experts: int, top_k: int = 2, tail_k: int = 4, gate: Gate = Gate()) -> None:
        super().__init__(dim, num_experts, gate)
        check_top_k(tail_k, num_experts, key="tail_k")
        check_top_k(top_k, tail_k - 1, limit="tail_k less 1", least=2)
        self.top_k = top_k
        self.tail_k = tail_k

    @property
    def experts_per_token(self) -> float:
        """tail_k, an upper bound."""
        return float(self.tail_k)

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to top_k or tail_k experts each."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        probs_TE = logits_TE.softmax(dim=-1)
        prob_TK, expert_TK = probs_TE.topk(self.tail_k, dim=-1)
        patch_T = inputs.valid_T & (inputs.modality_T == int(Modality.IMAGE))
        tail_T = find_tail(probs_TE.detach(), patch_T, inputs.num_sequences)
        choice_K = torch.arange(self.tail_k, device=prob_TK.device)
        chosen_TK = (choice_K < self.top_k) | tail_T.unsqueeze(-1)
        weight_TK = prob_TK.masked_fill(~chosen_TK, -torch.inf).softmax(dim=-1)
        return make_plan(inputs, logits_TE, probs_TE, expert_TK, weight_TK, chosen_TK)


def find_tail(probs_TE: Tensor, patch_T: Tensor, num_sequences: int) -> Tensor:
    """Return which patches have a variance over experts above the mean of their sample's patches: bool (T)."""
    length = len(patch_T) // num_sequences
    spread_BS = (probs_TE - probs_TE.mean(dim=-1, keepdim=True)).square().mean(dim=-1).view(num_sequences, length)
    patch_BS = patch_T.view(num_sequences, length)
    sum_B1 = (spread_BS * patch_BS).sum(dim=-1, keepdim=True)
    mean_B1 = sum_B1 / patch_BS.sum(dim=-1, keepdim=True).clamp(min=1)
    return (patch_BS & (spread_BS > mean_B1)).view(-1)
