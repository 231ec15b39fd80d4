"""Sort by expert, then one matrix product per expert on its contiguous rows.

No width or dtype limits, works under autocast, no padding. Segment lengths are read on the host, so on CUDA it
synchronises once per layer; the grouped dispatcher is meant for there.
"""

import torch
from torch import Tensor

from lightning_moevlm.dispatch.dispatcher import Dispatcher, combine, sort_by_expert
from lightning_moevlm.dispatch.expert_protocol import Experts
from lightning_moevlm.plans import PairPlan


class SegmentDispatcher(Dispatcher):
    """The fast path on CPUs, and the fallback everywhere."""

    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        pairs = sort_by_expert(plan)
        lengths: list[int] = pairs.load_E.tolist()
        num_kept = sum(lengths)
        token_N = pairs.token_N[:num_kept]
        weight_N = pairs.weight_N[:num_kept]
        segments = tokens_TD[token_N].split(lengths)
        # unbind once: its backward stacks the experts' gradients, where indexing would write the whole stack per expert
        per_expert = zip(*(stack.unbind(0) for stack in experts.stacks()), strict=True)
        rows_ND = torch.cat(
            [experts.run(segment, weights, torch.matmul) for segment, weights in zip(segments, per_expert, strict=True)]
        )
        return combine(rows_ND, token_N, weight_N, tokens_TD)
