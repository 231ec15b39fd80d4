"""The reference: one expert after the other. Slow for many experts; use it to check."""

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch.dispatcher import Dispatcher
from lightning_moevlm.model.dispatch.expert_protocol import Experts


class LoopDispatcher(Dispatcher):
    """For each expert: pick its rows, run it, add the weighted result."""

    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        out_TD = torch.zeros_like(tokens_TD)
        for expert in range(plan.num_experts):
            mine_N = (plan.expert_N == expert) & plan.kept_N
            if torch.compiler.is_compiling():  # shapes may not depend on data there: all pairs run, others weigh 0
                pair_M = torch.arange(plan.token_N.shape[0], device=tokens_TD.device)
            else:
                pair_M = torch.nonzero(mine_N).squeeze(-1)
            token_M = plan.token_N[pair_M]
            weights = tuple(stack[expert] for stack in experts.stacks())
            rows_MD = experts.run(tokens_TD[token_M], weights, torch.matmul)
            weighted_MD = rows_MD * torch.where(mine_N, plan.weight_N, 0.0)[pair_M].unsqueeze(-1)
            zeros_TD = torch.zeros(tokens_TD.shape, dtype=weighted_MD.dtype, device=tokens_TD.device)
            out_TD = out_TD + zeros_TD.index_add(0, token_M, weighted_MD).to(tokens_TD.dtype)
        return out_TD
