"""The whole layer as one node of the autograd graph, for experts of two matrix stages and an activation between them.

    p_i = x W_i,   h = a(p_1, ...),   y = h W_out,   out = sum over a token's pairs of g y     (each expert on its rows)

Backward, with r = the token's gradient in each of its rows and r' = r W_out^T:

    dW_out = h^T (g r),   dg = <h, r'>,   dp_i = da/dp_i (r'),   dW_i = (g x)^T dp_i,   dx = g sum_i dp_i W_i^T

Three things make it lean. The gate weight g is multiplied into rows of width D, never F. h is not kept but computed
again from p. And it goes through the experts block by block, consecutive experts with some hundred rows together, so
that what lies between the matrix products stays in cache and is never there for all rows at once.
It has no second derivative (torch raises an error); the loop dispatcher has one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lightning_moevlm.model.dispatch.expert_protocol import Activation
from lightning_moevlm.model.dispatch.segments.segment_linear import add_segments, multiply_segments, stack_gradient
from lightning_moevlm.model.dispatch.sorted_pairs import SortedPairs, sum_bags

_BLOCK_ROWS = 512


def segment_ffn(
    tokens_TD: Tensor,
    weight_N: Tensor,
    pairs: SortedPairs,
    activation: Activation,
    stacks: tuple[Tensor, ...],
) -> Tensor:
    """Return the combined result, (T, D), at least in fp32 (the weights' dtype).

    Args:
        tokens_TD: in the dtype of the matrix products, as the stacks.
        weight_N: combine weights in the plan's order.
        pairs: the kept pairs alone, with their lengths.
        activation: a and its derivative.
        stacks: W_1 ... each (E, D, F), then W_out (E, F, D).
    """
    wide = torch.promote_types(tokens_TD.dtype, weight_N.dtype)
    out_TD: Tensor = _SegmentFFN.apply(tokens_TD, weight_N.to(wide), pairs, activation, *stacks)
    return out_TD


class _SegmentFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tokens_TD: Tensor,
        weight_N: Tensor,
        pairs: SortedPairs,
        activation: Activation,
        *stacks: Tensor,
    ) -> Tensor:
        assert pairs.lengths is not None
        *inner, outer_EFD = stacks
        num_rows = pairs.token_M.shape[0]
        products = [tokens_TD.new_empty(num_rows, stack.shape[2]) for stack in inner]
        rows_MD = tokens_TD.new_empty(num_rows, outer_EFD.shape[2])
        with torch.autocast(tokens_TD.device.type, enabled=False):
            for experts, here, lengths in _blocks(pairs.lengths):
                x = tokens_TD.index_select(0, pairs.token_M[here])
                for stack, product in zip(inner, products, strict=True):
                    multiply_segments(x, stack[experts], lengths, product[here])
                hidden = activation.forward(*(product[here] for product in products))
                multiply_segments(hidden, outer_EFD[experts], lengths, rows_MD[here])
        ctx.save_for_backward(tokens_TD, weight_N, *stacks, *products)
        ctx.pairs, ctx.activation = pairs, activation  # type: ignore[attr-defined]
        return sum_bags(rows_MD.to(weight_N.dtype), pairs, weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        pairs: SortedPairs = ctx.pairs  # type: ignore[attr-defined]
        activation: Activation = ctx.activation  # type: ignore[attr-defined]
        assert pairs.lengths is not None
        tokens_TD, weight_N, *saved = ctx.saved_tensors  # type: ignore[attr-defined]
        num_inner = (len(saved) - 1) // 2
        inner, outer_EFD, products = saved[:num_inner], saved[num_inner], saved[num_inner + 1 :]
        needs_tokens, _, _, _, *needs_stack = ctx.needs_input_grad  # type: ignore[attr-defined]
        gradient_TD = gradient_TD.to(tokens_TD.dtype)
        weight_M1 = weight_N[pairs.pair_M].unsqueeze(-1)
        weight_gradient_M = weight_N.new_empty(pairs.pair_M.shape[0])
        rows_gradient_MD = tokens_TD.new_empty(pairs.token_M.shape[0], tokens_TD.shape[1]) if needs_tokens else None
        gradients = [
            torch.empty_like(stack, memory_format=torch.contiguous_format) if needed else None
            for stack, needed in zip((*inner, outer_EFD), needs_stack, strict=True)
        ]
        with torch.autocast(tokens_TD.device.type, enabled=False):
            for experts, here, lengths in _blocks(pairs.lengths):
                token, weight = pairs.token_M[here], weight_M1[here]
                gradient = gradient_TD.index_select(0, token)
                hidden_gradient = gradient.new_empty(gradient.shape[0], outer_EFD.shape[1])
                multiply_segments(gradient, outer_EFD[experts].transpose(1, 2), lengths, hidden_gradient)
                hidden, product_gradients = activation.backward(hidden_gradient, *(p[here] for p in products))
                weight_gradient_M[here] = torch.linalg.vecdot(hidden, hidden_gradient)
                if (outer_gradient := gradients[-1]) is not None:
                    stack_gradient(hidden, gradient.mul_(weight), lengths, outer_gradient[experts])
                del hidden, hidden_gradient
                x = tokens_TD.index_select(0, token).mul_(weight)
                for index, product_gradient in enumerate(product_gradients):
                    if (inner_gradient := gradients[index]) is not None:
                        stack_gradient(x, product_gradient, lengths, inner_gradient[experts])
                    if rows_gradient_MD is not None:
                        multiply = add_segments if index else multiply_segments
                        back = inner[index][experts].transpose(1, 2)
                        multiply(product_gradient, back, lengths, rows_gradient_MD[here])
                if rows_gradient_MD is not None:
                    rows_gradient_MD[here].mul_(weight)
        tokens_gradient_TD = None if rows_gradient_MD is None else sum_bags(rows_gradient_MD, pairs)
        weight_gradient_N = torch.zeros_like(weight_N).scatter_(0, pairs.pair_M, weight_gradient_M)
        return tokens_gradient_TD, weight_gradient_N, None, None, *gradients


def _blocks(lengths: list[int]) -> Iterator[tuple[slice, slice, list[int]]]:
    """Yield (experts, their rows, rows of each) for consecutive experts with at least `_BLOCK_ROWS` rows together."""
    first, start, stop = 0, 0, 0
    for expert, length in enumerate(lengths):
        stop += length
        if stop - start >= _BLOCK_ROWS or expert == len(lengths) - 1:
            yield slice(first, expert + 1), slice(start, stop), lengths[first : expert + 1]
            first, start = expert + 1, stop
