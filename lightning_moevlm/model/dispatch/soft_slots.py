"""Run soft slots: mix tokens into slots, run each expert on its own, mix the slot outputs into tokens.

    slots = dispatch x,   y = combine experts(slots)          (Soft MoE, arXiv 2308.00951, equations 1 and 2)

Every expert has the same number of rows, so whole weight stacks are multiplied.
"""

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import MixPlan
from lightning_moevlm.model.dispatch.expert_protocol import Experts


def run_slots(plan: MixPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
    """Return (T, D) in the tokens' dtype; slots are mixed in fp32 or wider and run in the tokens' dtype."""
    batch, num_experts, num_slots, length = plan.dispatch_BEZS.shape
    width = tokens_TD.shape[1]
    tokens_BSD = tokens_TD.reshape(batch, length, width).to(torch.promote_types(tokens_TD.dtype, torch.float32))
    slots_BEZD = torch.einsum("bezs,bsd->bezd", plan.dispatch_BEZS.to(tokens_BSD.dtype), tokens_BSD)
    rows_END = slots_BEZD.transpose(0, 1).reshape(num_experts, batch * num_slots, width).to(tokens_TD.dtype)
    run_END = experts.run(rows_END, experts.stacks(), torch.matmul)
    out_BEZD = run_END.reshape(num_experts, batch, num_slots, width).transpose(0, 1).to(tokens_BSD.dtype)
    mixed_BSD = torch.einsum("bsez,bezd->bsd", plan.combine_BSEZ.to(tokens_BSD.dtype), out_BEZD)
    return mixed_BSD.reshape(batch * length, width).to(tokens_TD.dtype)
