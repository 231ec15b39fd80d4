"""The whole layer as one node of the autograd graph, for experts of two matrix stages with an activation between them.

    p_i = x W_i,   h = a(p_1, ...),   y = h W_out,   out = sum over a token's pairs of g y        (per expert, on its rows)

Backward, with r = the token's gradient in each of its rows and r' = r W_out^T:

    dW_out = h^T (g r),   dg = <h, r'>,   dp_i = da/dp_i (r'),   dW_i = (g x)^T dp_i,   dx = g sum_i dp_i W_i^T

Three things make it lean. The gate weight g is multiplied into rows of width D, never F. h is not kept but computed
again from p, through autograd, so an activation is written once and its derivative nowhere. Everything between the
matrix products happens on one expert's rows while they are in cache, and weight gradients are written in place.
The second derivative is not offered (torch says so when asked); the loop dispatcher has it.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lightning_moevlm.dispatch.expert_protocol import Activation
from lightning_moevlm.dispatch.pairs import SortedPairs, sum_bags
from lightning_moevlm.dispatch.segment_linear import new_stack_gradient, segments


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
        activation: a; draws nothing at random, because it runs again in the backward pass.
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
            for expert, here in segments(pairs.lengths):
                x = tokens_TD.index_select(0, pairs.token_M[here])
                at_expert = [product[here] for product in products]
                for product, stack in zip(at_expert, inner, strict=True):
                    torch.mm(x, stack[expert], out=product)
                torch.mm(activation(*at_expert), outer_EFD[expert], out=rows_MD[here])
        ctx.save_for_backward(tokens_TD, weight_N, *stacks, *products)
        ctx.pairs, ctx.activation = pairs, activation  # type: ignore[attr-defined]
        return sum_bags(rows_MD.to(weight_N.dtype), pairs, weight_N[pairs.pair_M])

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
        stack_gradients = [
            new_stack_gradient(stack, pairs.lengths) if needed else None
            for stack, needed in zip((*inner, outer_EFD), needs_stack, strict=True)
        ]
        with torch.autocast(tokens_TD.device.type, enabled=False):
            for expert, here in segments(pairs.lengths):
                token, weight = pairs.token_M[here], weight_M1[here]
                with torch.enable_grad():
                    leaves = [product[here].detach().requires_grad_() for product in products]
                    hidden = activation(*leaves)
                gradient = gradient_TD.index_select(0, token)
                hidden_gradient = torch.mm(gradient, outer_EFD[expert].t())
                weight_gradient_M[here] = torch.linalg.vecdot(hidden.detach(), hidden_gradient)
                if (outer_gradient := stack_gradients[-1]) is not None:
                    torch.mm(hidden.detach().t(), gradient.mul_(weight), out=outer_gradient[expert])
                product_gradients = torch.autograd.grad(hidden, leaves, hidden_gradient)
                del hidden, hidden_gradient, leaves
                x = tokens_TD.index_select(0, token).mul_(weight)
                for index, product_gradient in enumerate(product_gradients):
                    if (inner_gradient := stack_gradients[index]) is not None:
                        torch.mm(x.t(), product_gradient, out=inner_gradient[expert])
                    if rows_gradient_MD is not None:
                        into = rows_gradient_MD[here]
                        torch.addmm(
                            into, product_gradient, inner[index][expert].t(), beta=float(index > 0), out=into
                        )
                if rows_gradient_MD is not None:
                    rows_gradient_MD[here].mul_(weight)
        tokens_gradient_TD = None if rows_gradient_MD is None else sum_bags(rows_gradient_MD, pairs)
        weight_gradient_N = torch.zeros_like(weight_N).scatter_(0, pairs.pair_M, weight_gradient_M)
        return tokens_gradient_TD, weight_gradient_N, None, None, *stack_gradients
