"""Expert choice: each expert takes the tokens that it likes best, so loads are equal by construction.

    p = softmax over experts,   expert e takes the C tokens with the largest p_.e,   C = ceil(capacity_factor * T / E)

Zhou et al. 2022 (arXiv 2202.09368, section 3.1). With sigmoid scores an expert's score of a token does not depend on
the other experts (MoMa, arXiv 2407.21770, section 2.2), so even a single expert learns a weight. A token may get
several experts or none. Tokens compete across the batch, so it is not causal: training would see the future. In
evaluation, too, the output for a sample depends on the other samples of its batch. MoMa measures its causal loss with
auxiliary routers that learn afterwards which tokens an expert takes; there are none here, and causal models refuse it.
"""

import math
from typing import Literal

import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import renormalise_weights
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.router import LinearRouter


class ExpertChoiceRouter(LinearRouter):
    """Experts choose tokens.

    Args:
        dim: model width D.
        num_experts: E.
        capacity_factor: experts per token on average, up to E.
        score: sigmoid scores each expert on its own; null is a softmax over experts.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: capacity_factor outside (0, E].
    """

    competes = True
    crosses_samples = True
    never_starves = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity_factor: float = 1.0,
        score: Literal["sigmoid"] | None = None,
        gate: Gate = Gate(),
    ) -> None:
        super().__init__(dim, num_experts, gate)
        if not 0 < capacity_factor <= num_experts:
            raise UserError(
                f"router.capacity_factor is {capacity_factor}: choose a number of experts per token above 0 and up to "
                f"{num_experts}, the num_experts"
            )
        self.capacity_factor = capacity_factor
        self.score = score

    @property
    def experts_per_token(self) -> float:
        """The capacity factor."""
        return self.capacity_factor

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Let each of E experts take C tokens; of T tokens with padding, the share of the valid ones is taken.

        probs_TE of sigmoid scores are divided by their sum, so that losses see a distribution.
        """
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        scores_TE = logits_TE.softmax(dim=-1) if self.score is None else logits_TE.sigmoid()
        num_tokens = scores_TE.shape[0]
        places = min(num_tokens, math.ceil(self.capacity_factor * num_tokens / self.num_experts))
        liked_TE = scores_TE.detach().masked_fill(~inputs.valid_T.unsqueeze(-1), -1.0)
        token_CE = liked_TE.topk(places, dim=0).indices
        weight_CE = scores_TE.gather(0, token_CE)
        taken = torch.ceil(inputs.valid_T.sum().double() * self.capacity_factor / self.num_experts - 1e-9)
        place_C1 = torch.arange(places, device=token_CE.device).unsqueeze(-1)
        chosen_N = (inputs.valid_T[token_CE] & (place_C1 < taken)).reshape(-1)
        expert_CE = torch.arange(self.num_experts, device=token_CE.device).expand_as(token_CE)
        return PairPlan(
            token_N=token_CE.reshape(-1),
            expert_N=expert_CE.reshape(-1),
            weight_N=weight_CE.reshape(-1),
            chosen_N=chosen_N,
            kept_N=chosen_N,
            logits_TE=logits_TE,
            probs_TE=scores_TE if self.score is None else renormalise_weights(scores_TE),
            modality_T=inputs.modality_T,
            valid_T=inputs.valid_T,
            num_sequences=inputs.num_sequences,
        )
