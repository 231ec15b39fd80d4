"""Sort by expert, then `torch.nn.functional.grouped_mm` over all segments at once: no host synchronisation.

Requirements of `grouped_mm` in torch 2.13: fp32, bf16 or fp16; row strides in multiples of 16 bytes; contiguous
gradients; int32 offsets. It ignores autocast. On CUDA its own kernel is for bf16 on compute capability 9.0 and later;
elsewhere torch runs one product per expert and waits. Widths and dtypes that it cannot run are refused with the remedy.

Off the CPU the host does not know how many pairs are kept, so those that are not stand behind the last offset. Their
rows are never read by the product or its gradients, and are left uninitialised in what it returns. A function that is
elementwise in the rows leaves what lies there where it is, and a mask at both ends keeps it out of tokens and weights.
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
        wait = _is_read_at_once(tokens_TD)
        pairs = sort_by_expert(plan, wait=wait)
        offset_E = pairs.end_E.to(torch.int32)

        def product(rows: Tensor, weight: Tensor, /) -> Tensor:
            return _grouped_mm(rows, weight, offset_E)

        rows_MD = gather_rows(tokens_TD.to(dtype), pairs)
        if wait:  # the rows are those of the kept pairs
            return combine(experts.run(rows_MD, stacks, product), plan.weight_N, pairs, tokens_TD.dtype)
        kept_M1 = (torch.arange(pairs.token_M.shape[0], device=tokens_TD.device) < offset_E[-1]).unsqueeze(-1)

        def masked(rows: Tensor, weight: Tensor, /) -> Tensor:
            return _mask(product(_mask(rows, kept_M1), weight), kept_M1)

        # without a known activation, what stands between the products may sum over rows: the gradient of a bias does
        linear = product if experts.activation() is not None else masked
        rows_MD = _mask(experts.run(_mask(rows_MD, kept_M1), stacks, linear), kept_M1)
        return combine(rows_MD, plan.weight_N, pairs, tokens_TD.dtype)

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


def _is_read_at_once(tokens_TD: Tensor) -> bool:
    """Return whether the host reads values of the tokens' device without waiting."""
    return tokens_TD.device.type == "cpu" and not torch.compiler.is_compiling()


def _mask(rows: Tensor, kept_M1: Tensor) -> Tensor:
    """Return zeros in place of rows that are not kept, NaN too, in values and in the gradient that comes back."""
    return torch.where(kept_M1, rows, 0.0)


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
