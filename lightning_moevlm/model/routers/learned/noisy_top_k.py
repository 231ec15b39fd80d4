"""Noisy top-k: normal noise on the logits while training, so that near-ties are explored.

    selection by logits + sigma * N(0, 1),   weights from the softmax of the noisy logits

fixed noise, sigma = noise_scale / E: V-MoE (arXiv 2106.05974, section 2.1, noise_scale 1). Learned noise,
sigma = softplus(x W_noise), and a softmax over the chosen alone, which is `renormalise`: Shazeer et al. 2017
(arXiv 1701.06538, equations 3 to 5). Evaluation uses no noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import (
    check_renormalise,
    check_top_k,
    choose_experts,
    make_plan,
    renormalise_weights,
)
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.router import LinearRouter


class NoisyTopKRouter(LinearRouter):
    """Softmax top-k on noisy logits.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: experts per token.
        noise_scale: sigma of fixed noise in units of 1 / E.
        learned_noise: learn sigma per token and expert instead.
        renormalise: divide the chosen weights by their sum. Needs top_k >= 2, see `TopKRouter`.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: top_k outside 1..E, a negative noise_scale, or renormalise with top_k = 1.
    """

    takes_choices = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        noise_scale: float = 1.0,
        learned_noise: bool = False,
        renormalise: bool = False,
        gate: Gate = Gate(),
    ) -> None:
        super().__init__(dim, num_experts, gate)
        check_top_k(top_k, num_experts)
        check_renormalise(renormalise, top_k)
        check_number("noise_scale", noise_scale, least=0)
        self.top_k = top_k
        self.noise_scale = noise_scale
        self.renormalise = renormalise
        self.adds_noise = learned_noise or noise_scale > 0
        self.noise_weight_ED = nn.Parameter(torch.empty(num_experts, dim)) if learned_noise else None

    def forward_flops_per_token(self) -> int:
        """2 D E, twice with learned noise."""
        return (2 if self.noise_weight_ED is None else 4) * self.dim * self.num_experts

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K experts each; logits_TE of the plan are without noise."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        std_TE = self._noise_std(inputs.tokens_TD, logits_TE) if self.training else None
        noisy_TE = None if std_TE is None else logits_TE + torch.randn_like(logits_TE) * std_TE
        probs_TE = (logits_TE if noisy_TE is None else noisy_TE).softmax(dim=-1)
        expert_TK = choose_experts(probs_TE, self.top_k, inputs)
        weight_TK = probs_TE.gather(-1, expert_TK)
        if self.renormalise:
            weight_TK = renormalise_weights(weight_TK)
        return make_plan(
            inputs, logits_TE, probs_TE, expert_TK, weight_TK, noise_std_TE=std_TE, noisy_logits_TE=noisy_TE
        )

    def _noise_std(self, tokens_TD: Tensor, logits_TE: Tensor) -> Tensor:
        if self.noise_weight_ED is None:
            return torch.full_like(logits_TE, self.noise_scale / self.num_experts)
        return F.softplus(F.linear(tokens_TD, self.noise_weight_ED.to(tokens_TD.dtype)).float())
