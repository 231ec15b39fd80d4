"""Softmax top-k: each token goes to the k experts that it scores highest.

    logits = x W^T,   p = softmax(logits),   experts = top-k(p),   weight_e = p_e   (or p_e / sum of the chosen p)

Shazeer et al. 2017 (arXiv 1701.06538, section 2.1); without renormalisation and with k = 1 it is Switch
(arXiv 2101.03961, equation 2), which is what VL-MoE uses (arXiv 2303.07226).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.errors import UserError
from lightning_moevlm.plans import PairPlan, RoutingInput
from lightning_moevlm.routers.router import Router


class TopKRouter(Router):
    """Softmax over all experts, then the k largest.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: experts per token, 1 <= top_k <= E.
        renormalise: divide the chosen weights by their sum. Needs top_k >= 2: a single weight would always be 1 and the
            task loss could no longer reach the router.

    Raises:
        UserError: top_k outside 1..E, or renormalise with top_k = 1.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 1, renormalise: bool = False) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise UserError(
                f"top_k is {top_k} with num_experts {num_experts}: choose top_k between 1 and {num_experts}"
            )
        if renormalise and top_k == 1:
            raise UserError(
                "renormalise needs top_k >= 2: with top_k 1 every weight becomes 1 and the router gets no gradient "
                "from the task; set renormalise to false or top_k to 2"
            )
        self.dim = dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.renormalise = renormalise
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward_flops_per_token(self) -> int:
        """2 D E."""
        return 2 * self.dim * self.num_experts

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K experts each; pairs are ordered by choice, then token, so first choices come first."""
        logits_TE = F.linear(inputs.tokens_TD, self.weight_ED.to(inputs.tokens_TD.dtype)).float()
        probs_TE = logits_TE.softmax(dim=-1)
        weight_TK, expert_TK = probs_TE.topk(self.top_k, dim=-1)
        if self.renormalise:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        token_T = torch.arange(probs_TE.shape[0], device=probs_TE.device)
        return PairPlan(
            token_N=token_T.repeat(self.top_k),
            expert_N=choice_major(expert_TK),
            weight_N=choice_major(weight_TK),
            kept_N=inputs.valid_T.repeat(self.top_k),
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            modality_T=inputs.modality_T,
            valid_T=inputs.valid_T,
        )


def choice_major(values_TK: Tensor) -> Tensor:
    """Flatten (T, K) to N = K T with all first choices before all second ones."""
    return values_TK.t().reshape(-1)
