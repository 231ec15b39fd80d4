"""One matrix product per expert on its contiguous rows, as one node of the autograd graph.

    rows of expert e  x  W_e,     dW_e = rows_e^T x dY_e,     drows_e = dY_e x W_e^T

Weight gradients are written straight into one buffer of the stack's shape. Through autograd alone, `W[e]` would write a
zero tensor of the whole stack per expert, and `unbind` would stack the experts' gradients in one more copy.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def segment_linear(rows_MI: Tensor, stack_EIO: Tensor, lengths: list[int]) -> Tensor:
    """Multiply consecutive segments of rows, lengths[e] of them, by the matrices of a stack; any dtype, any width."""
    product_MO: Tensor = _SegmentLinear.apply(rows_MI, stack_EIO, lengths)
    return product_MO


def segments(lengths: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield (expert, its rows) for every expert that has any."""
    start = 0
    for expert, length in enumerate(lengths):
        if length:
            yield expert, slice(start, start + length)
        start += length


def new_stack_gradient(stack_EIO: Tensor, lengths: list[int]) -> Tensor:
    """Return a buffer for a stack's gradient in which the experts without rows are zero and the rest is not written."""
    gradient_EIO = torch.empty_like(stack_EIO, memory_format=torch.contiguous_format)
    for expert, length in enumerate(lengths):
        if not length:
            gradient_EIO[expert].zero_()
    return gradient_EIO


class _SegmentLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows_MI: Tensor, stack_EIO: Tensor, lengths: list[int]) -> Tensor:
        ctx.save_for_backward(rows_MI, stack_EIO)
        ctx.lengths = lengths  # type: ignore[attr-defined]
        product_MO = rows_MI.new_empty(rows_MI.shape[0], stack_EIO.shape[2])
        for expert, here in segments(lengths):
            torch.mm(rows_MI[here], stack_EIO[expert], out=product_MO[here])
        return product_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient_MO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_MI, stack_EIO = ctx.saved_tensors  # type: ignore[attr-defined]
        lengths: list[int] = ctx.lengths  # type: ignore[attr-defined]
        needs_rows, needs_stack = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        rows_gradient_MI = torch.empty_like(rows_MI) if needs_rows else None
        stack_gradient_EIO = new_stack_gradient(stack_EIO, lengths) if needs_stack else None
        for expert, here in segments(lengths):
            gradient = gradient_MO[here]
            if rows_gradient_MI is not None:
                torch.mm(gradient, stack_EIO[expert].t(), out=rows_gradient_MI[here])
            if stack_gradient_EIO is not None:
                torch.mm(rows_MI[here].t(), gradient, out=stack_gradient_EIO[expert])
        return rows_gradient_MI, stack_gradient_EIO, None
