"""Soft MoE: no token is dropped and no choice is made; every expert works on mixes of its sequence's tokens.

    logits = s * l2(x) . l2(Phi)          one score per token and slot; Phi: Z slots for each of E experts
    dispatch = softmax over the sequence's tokens,   combine = softmax over all E x Z slots

Soft MoE (arXiv 2308.00951, section 2; normalisation and the learned scale s: section 2.3). The cost is set by the
number of slots; slots = tokens is the compute of one expert per token. Every position sees every other of its sequence,
so it is not causal; sequences of a batch never mix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import MixPlan, RoutingInput
from lightning_moevlm.model.routers.gate import Gate, refuse_zero_start
from lightning_moevlm.model.routers.router import Router


class SoftRouter(Router):
    """Slots instead of choices.

    Args:
        dim: model width D.
        num_experts: E.
        slots_per_expert: Z; E x Z slots serve a sequence of any length.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: fewer than one slot, or a gate that starts at 0.
    """

    competes = True
    never_starves = True
    mixes = True

    def __init__(self, dim: int, num_experts: int, slots_per_expert: int = 2, gate: Gate = Gate()) -> None:
        super().__init__(dim, num_experts, gate)
        if slots_per_expert < 1:
            raise UserError(f"router.slots_per_expert is {slots_per_expert}: choose 1 or more")
        refuse_zero_start(gate, "SoftRouter", "a slot of length 0 has no direction")
        self.slots_per_expert = slots_per_expert
        self.slot_EZD = nn.Parameter(torch.empty(num_experts, slots_per_expert, dim))
        self.scale = nn.Parameter(torch.ones(()))

    @property
    def experts_per_token(self) -> float:
        """E: every token has a share in every expert."""
        return float(self.num_experts)

    def expert_rows(self, num_tokens: int) -> float:
        """E Z, for every length of the sequence."""
        return float(self.num_experts * self.slots_per_expert)

    def forward_flops_per_token(self) -> int:
        """6 D E Z: scores, mixing tokens into slots, mixing slots into tokens."""
        return 6 * self.dim * self.num_experts * self.slots_per_expert

    def rows(self) -> Tensor:
        """Return the slots' vectors, (E x Z, D)."""
        return self.slot_EZD.flatten(0, 1)

    def forward(self, inputs: RoutingInput) -> MixPlan:
        """Mix the T = B x S tokens of each sequence."""
        tokens_TD = self.gate.inputs(inputs.tokens_TD, self.training)
        slots_ND = F.normalize(self.slot_EZD.flatten(0, 1).float(), dim=-1).to(tokens_TD.dtype)
        cosine_TN = F.linear(F.normalize(tokens_TD.float(), dim=-1).to(tokens_TD.dtype), slots_ND).float()
        scores_TEZ = (cosine_TN * self.scale.float() / self.gate.temperature).unflatten(
            -1, (self.num_experts, self.slots_per_expert)
        )
        logits_TE = scores_TEZ.logsumexp(dim=-1)
        shape = (inputs.num_sequences, -1 if scores_TEZ.shape[0] else 0)
        valid_BS11 = inputs.valid_T.reshape(shape)[:, :, None, None]
        scores_BSEZ = scores_TEZ.unflatten(0, shape)
        # a finite floor, so that a sequence without valid tokens gives numbers, which the mask then removes
        masked_BSEZ = scores_BSEZ.masked_fill(~valid_BS11, torch.finfo(scores_BSEZ.dtype).min)
        dispatch_BSEZ = masked_BSEZ.softmax(dim=1) * valid_BS11
        combine_BSEZ = scores_BSEZ.flatten(2).softmax(dim=-1).view_as(scores_BSEZ) * valid_BS11
        return MixPlan(
            dispatch_BEZS=dispatch_BSEZ.permute(0, 2, 3, 1),
            combine_BSEZ=combine_BSEZ,
            logits_TE=logits_TE,
            probs_TE=logits_TE.softmax(dim=-1),
            modality_T=inputs.modality_T,
            valid_T=inputs.valid_T,
            num_sequences=inputs.num_sequences,
        )
