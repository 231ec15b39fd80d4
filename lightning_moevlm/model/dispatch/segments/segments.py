"""Sort by expert, then one matrix product per expert on its contiguous rows.

No width or dtype limits, works under autocast, no padding, no work for experts without rows. Segment lengths are read
on the host, so on CUDA it waits for the device once per layer.
"""

from functools import partial

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch.dispatcher import Dispatcher, matmul_dtype
from lightning_moevlm.model.dispatch.expert_protocol import Experts
from lightning_moevlm.model.dispatch.segments.compiled_products import run_in_graph
from lightning_moevlm.model.dispatch.segments.segment_ffn import segment_ffn
from lightning_moevlm.model.dispatch.segments.segment_linear import segment_linear
from lightning_moevlm.model.dispatch.sorted_pairs import combine, gather_rows, sort_by_expert


class SegmentDispatcher(Dispatcher):
    """The fast path on CPUs, and the one that runs everywhere.

    Experts that name their `activation` run as one node of the graph (`segment_ffn`), any others through
    `segment_linear`, product by product.
    """

    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        dtype = matmul_dtype(tokens_TD)
        stacks = tuple(stack.to(dtype) for stack in experts.stacks())
        if torch.compiler.is_compiling():
            return run_in_graph(plan, tokens_TD, experts, stacks, "segments")
        pairs = sort_by_expert(plan, wait=True)
        assert pairs.lengths is not None
        activation = experts.activation()
        if activation is not None:
            out_TD = segment_ffn(tokens_TD.to(dtype), plan.weight_N, pairs, activation, stacks)
            return out_TD.to(tokens_TD.dtype)
        rows_MD = gather_rows(tokens_TD.to(dtype), pairs)
        rows_MD = experts.run(rows_MD, stacks, partial(segment_linear, lengths=pairs.lengths))
        return combine(rows_MD, plan.weight_N, pairs, tokens_TD.dtype)
