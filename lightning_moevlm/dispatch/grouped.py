"""Sort by expert, then `torch.nn.functional.grouped_mm` over all segments at once: no host synchronisation.

What torch 2.13 asks of `grouped_mm`: fp32, bf16 or fp16; row strides in multiples of 16 bytes; contiguous gradients;
int32 offsets. It ignores autocast and leaves rows behind the last offset uninitialised. Widths that break the stride
rule are refused with the remedy; there is no silent fallback.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.dispatch.dispatcher import Dispatcher, combine, sort_by_expert
from lightning_moevlm.dispatch.expert_protocol import Experts
from lightning_moevlm.errors import UserError
from lightning_moevlm.plans import PairPlan

_ALIGNMENT_BYTES = 16


class GroupedDispatcher(Dispatcher):
    """The fast path on CUDA."""

    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        dtype = _matmul_dtype(tokens_TD)
        stacks = tuple(stack.to(dtype) for stack in experts.stacks())
        for stack in stacks:
            _check_alignment(stack)
        pairs = sort_by_expert(plan)
        offset_E = pairs.load_E.cumsum(0).to(torch.int32)
        kept_N1 = (torch.arange(pairs.token_N.shape[0], device=tokens_TD.device) < offset_E[-1]).unsqueeze(-1)

        def grouped_linear(rows: Tensor, weight: Tensor, /) -> Tensor:
            product = F.grouped_mm(_Contiguous.apply(rows), weight, offs=offset_E)
            # the tail is uninitialised memory: where() keeps a NaN there out of values and of gradients
            return torch.where(kept_N1, _Contiguous.apply(product), 0.0)

        rows_ND = torch.where(kept_N1, tokens_TD[pairs.token_N].to(dtype), 0.0)
        return combine(experts.run(rows_ND, stacks, grouped_linear), pairs.token_N, pairs.weight_N, tokens_TD)


class _Contiguous(torch.autograd.Function):
    """Identity whose gradient is contiguous and zero where it was not written.

    `grouped_mm` refuses expanded gradients ("Invalid strides") in its backward.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor) -> Tensor:
        return values.contiguous()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def _matmul_dtype(tokens_TD: Tensor) -> torch.dtype:
    device_type = tokens_TD.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return tokens_TD.dtype


def _check_alignment(stack: Tensor) -> None:
    for width in stack.shape[1:]:
        if (width * stack.element_size()) % _ALIGNMENT_BYTES:
            multiple = _ALIGNMENT_BYTES // stack.element_size()
            raise UserError(
                f"GroupedDispatcher cannot run experts of width {width} in {stack.dtype}: widths must be multiples of "
                f"{multiple}; change dim or hidden_dim, or use SegmentDispatcher, which has no such limit"
            )
