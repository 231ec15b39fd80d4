"""Run experts that every token visits: no routing, every expert sees all tokens, and their outputs are summed."""

import torch
from torch import Tensor

from lightning_moevlm.model.dispatch.expert_protocol import Experts


def run_everywhere(tokens_TD: Tensor, experts: Experts) -> Tensor:
    """Return the sum over the stack's experts, (T, D) in the tokens' dtype."""
    per_expert = zip(*(stack.unbind(0) for stack in experts.stacks()), strict=True)
    outputs = [experts.run(tokens_TD, weights, torch.matmul) for weights in per_expert]
    return torch.stack(outputs).sum(dim=0).to(tokens_TD.dtype) if len(outputs) > 1 else outputs[0].to(tokens_TD.dtype)
