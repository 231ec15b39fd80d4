"""Sort by expert, then `torch.nn.functional.grouped_mm` over all segments at once: no host synchronisation.

Requirements of `grouped_mm` in torch 2.13: fp32, bf16 or fp16; row strides in multiples of 16 bytes; contiguous
gradients; int32 offsets. It ignores autocast and leaves rows behind the last offset uninitialised. On CUDA its own
kernel is for bf16 on compute capability 9.0 and later; elsewhere torch runs one product per expert and waits.
Widths and dtypes that it cannot run are refused with the remedy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch.dispatcher import Dispatcher, matmul_dtype
from lightning_moevlm.model.dispatch.expert_protocol import Experts
from lightning_moevlm.model.dispatch.segments.compiled_products import run_in_graph
from lightning_moevlm.model.dispatch.sorted_pairs import combine, gather_rows, sort_by_expert

_ALIGNMENT_BYTES = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GroupedDispatcher(Dispatcher):
    """The fast path on CUDA."""

    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        refusal = self.refusal(tokens_TD, experts)
        if refusal is not None:
            raise UserError(f"GroupedDispatcher cannot run this: {refusal}")
        dtype = matmul_dtype(tokens_TD)
        stacks = tuple(stack.to(dtype) for stack in experts.stacks())
        if torch.compiler.is_compiling() and dtype != torch.bfloat16:
            return run_in_graph(plan, tokens_TD, experts, stacks, "grouped")
        wait = tokens_TD.device.type == "cpu" and not torch.compiler.is_compiling()
        pairs = sort_by_expert(plan, wait=wait)
        offset_E = pairs.load_E.cumsum(0).to(torch.int32)
        rows_MD = gather_rows(tokens_TD.to(dtype), pairs)
        if wait:  # the rows are those of the kept pairs
            rows_MD = experts.run(rows_MD, stacks, lambda rows, weight: _grouped_mm(rows, weight, offset_E))
            return combine(rows_MD, plan.weight_N, pairs, tokens_TD.dtype)
        kept_M1 = (torch.arange(pairs.token_M.shape[0], device=tokens_TD.device) < offset_E[-1]).unsqueeze(-1)

        def masked(rows: Tensor, weight: Tensor, /) -> Tensor:
            # the tail is uninitialised memory: where() keeps a NaN there out of values and of gradients
            return torch.where(kept_M1, _grouped_mm(rows, weight, offset_E), 0.0)

        rows_MD = experts.run(torch.where(kept_M1, rows_MD, 0.0), stacks, masked)
        # experts may make something of a row of zeros: it weighs nothing, and no gradient comes back through it
        weight_N = torch.where(plan.kept_N, plan.weight_N, 0.0)
        return combine(rows_MD, weight_N, pairs, tokens_TD.dtype)

    def refusal(self, tokens_TD: Tensor, experts: Experts) -> str | None:
        """Name a dtype or a width that `grouped_mm` cannot run."""
        dtype = matmul_dtype(tokens_TD)
        if dtype not in _DTYPES:
            return f"grouped_mm has no {dtype}; use fp32, bf16 or fp16, or SegmentDispatcher, which has no such limit"
        multiple = _ALIGNMENT_BYTES // dtype.itemsize
        for stack in experts.stacks():
            for width in stack.shape[1:]:
                if width % multiple:
                    return (
                        f"width {width} in {dtype}: widths must be multiples of {multiple}; change dim or hidden_dim, "
                        "or use SegmentDispatcher, which has no such limit"
                    )
        return None


class _Contiguous(torch.autograd.Function):
    """Identity with a contiguous gradient: `grouped_mm` refuses expanded ones ("Invalid strides") in its backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        return values.contiguous()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def _grouped_mm(rows: Tensor, weight: Tensor, offset_E: Tensor) -> Tensor:
    return _Contiguous.apply(F.grouped_mm(_Contiguous.apply(rows.to(weight.dtype)), weight, offs=offset_E))
