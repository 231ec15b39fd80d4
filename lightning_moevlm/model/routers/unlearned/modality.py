"""Routing by modality: images and text have experts of their own, and take them in turn.

    image: experts 0, 2, 4, ...   text: experts 1, 3, 5, ...        within a modality the next token takes the next ones

The hard split of VLMo (arXiv 2111.02358) and of MoMa's groups (arXiv 2407.21770, section 2.1) without anything learned
inside: the control for what a shared mixture of experts learns about modalities. Weights are 1 / k; no parameters.
Turns are taken over the batch while training, and over the sample in evaluation.
"""

import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import check_top_k, count_turns, even_plan
from lightning_moevlm.model.routers.router import Router


class ModalityRouter(Router):
    """Experts by modality, in turn.

    Args:
        dim: model width D, not used.
        num_experts: E, at least one for each modality; E = 2 is one fixed expert per modality.
        top_k: experts per token.

    Raises:
        UserError: fewer experts than modalities, or top_k above a modality's share of E.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 1) -> None:
        super().__init__(dim, num_experts)
        if num_experts < len(Modality):
            raise UserError(
                f"moe.num_experts is {num_experts}: ModalityRouter needs at least {len(Modality)} experts, "
                "one per modality"
            )
        check_top_k(top_k, num_experts // len(Modality), limit="num_experts per modality")
        self.top_k = top_k

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K experts of their modality."""
        turn_T = torch.zeros_like(inputs.modality_T)
        for modality in Modality:  # padding takes no turn, nor does the other modality
            mine_T = inputs.valid_T & (inputs.modality_T == int(modality))
            turn_T = torch.where(mine_T, count_turns(mine_T, inputs.num_sequences, self.training), turn_T)
        share = self.num_experts // len(Modality)
        choice_K = torch.arange(self.top_k, device=turn_T.device)
        place_TK = (turn_T.unsqueeze(-1) * self.top_k + choice_K) % share
        expert_TK = place_TK * len(Modality) + inputs.modality_T.unsqueeze(-1)
        return even_plan(inputs, expert_TK, self.num_experts)
