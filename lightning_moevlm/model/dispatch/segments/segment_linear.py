"""One matrix product per expert on its contiguous rows, as one node of the autograd graph.

    rows of expert e  x  W_e,     dW_e = rows_e^T x dY_e,     drows_e = dY_e x W_e^T

Weight gradients are written straight into one buffer of the stack's shape. Through autograd alone, `W[e]` would write a
zero tensor of the whole stack per expert, and `unbind` would stack the experts' gradients in one more copy.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def segment_linear(rows_MI: Tensor, stack_EIO: Tensor, lengths: list[int]) -> Tensor:
    """Multiply consecutive segments of rows, lengths[e] of them, by the matrices of a stack; any dtype, any width."""
    product_MO: Tensor = _SegmentLinear.apply(rows_MI.to(stack_EIO.dtype), stack_EIO, lengths)
    return product_MO


def multiply_segments(rows_MI: Tensor, stack_EIO: Tensor, lengths: list[int], out_MO: Tensor) -> None:
    """Write rows_e x W_e for every segment; no gradient."""
    pieces = zip(lengths, rows_MI.split(lengths), stack_EIO.unbind(0), out_MO.split(lengths), strict=True)
    for length, rows, matrix, out in pieces:
        if length:
            torch.mm(rows, matrix, out=out)


def add_segments(rows_MI: Tensor, stack_EIO: Tensor, lengths: list[int], out_MO: Tensor) -> None:
    """Add rows_e x W_e for every segment; no gradient."""
    pieces = zip(lengths, rows_MI.split(lengths), stack_EIO.unbind(0), out_MO.split(lengths), strict=True)
    for length, rows, matrix, out in pieces:
        if length:
            out.addmm_(rows, matrix)


def stack_gradient(rows_MI: Tensor, gradient_MO: Tensor, lengths: list[int], out_EIO: Tensor) -> None:
    """Write rows_e^T x gradient_e for every segment, zeros for an expert without rows."""
    pieces = zip(lengths, rows_MI.split(lengths), gradient_MO.split(lengths), out_EIO.unbind(0), strict=True)
    for length, rows, gradient, out in pieces:
        if length:
            torch.mm(rows.t(), gradient, out=out)
        else:
            out.zero_()


class _SegmentLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows_MI: Tensor, stack_EIO: Tensor, lengths: list[int]) -> Tensor:
        ctx.save_for_backward(rows_MI, stack_EIO)
        ctx.lengths = lengths  # type: ignore[attr-defined]
        product_MO = rows_MI.new_empty(rows_MI.shape[0], stack_EIO.shape[2])
        multiply_segments(rows_MI, stack_EIO, lengths, product_MO)
        return product_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient_MO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_MI, stack_EIO = ctx.saved_tensors  # type: ignore[attr-defined]
        lengths: list[int] = ctx.lengths  # type: ignore[attr-defined]
        needs_rows, needs_stack = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        rows_gradient_MI, stack_gradient_EIO = None, None
        if needs_rows:
            rows_gradient_MI = torch.empty_like(rows_MI)
            multiply_segments(gradient_MO, stack_EIO.transpose(1, 2), lengths, rows_gradient_MI)
        if needs_stack:
            stack_gradient_EIO = torch.empty_like(stack_EIO, memory_format=torch.contiguous_format)
            stack_gradient(rows_MI, gradient_MO, lengths, stack_gradient_EIO)
        return rows_gradient_MI, stack_gradient_EIO, None
