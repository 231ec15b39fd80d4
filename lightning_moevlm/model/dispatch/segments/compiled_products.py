"""One matrix product per expert as an operator that `torch.compile` takes into its graph whole.

Segment lengths are read on the host, and `grouped_mm` fails the compiler's shape check in any dtype but bf16: traced,
either would break the graph, once per enclosing module. As an operator with a known output shape it does not.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch.expert_protocol import Experts
from lightning_moevlm.model.dispatch.segments.segment_linear import multiply_segments, stack_gradient
from lightning_moevlm.model.dispatch.sorted_pairs import combine, gather_rows, sort_by_expert


@torch.library.custom_op("moevlm::expert_products", mutates_args=())
def expert_products(rows_MI: Tensor, stack_EIO: Tensor, end_E: Tensor, way: str) -> Tensor:
    """Multiply consecutive segments of rows by the matrices of a stack; rows behind them give 0.

    Args:
        rows_MI: sorted by expert, in the dtype of the stack.
        stack_EIO: a matrix per expert.
        end_E: int64, the row behind each segment's last one.
        way: "segments", a product per expert; "grouped", by `grouped_mm`; "padded", one batched product.
    """
    lengths = _lengths(end_E)
    num_rows = sum(lengths)
    product_MO = rows_MI.new_zeros(rows_MI.shape[0], stack_EIO.shape[2])
    if way == "padded":
        rows_ECI = _pad(rows_MI, lengths)
        for rows, length, product in zip(
            torch.bmm(rows_ECI, stack_EIO), lengths, _split(product_MO, lengths), strict=True
        ):
            product.copy_(rows[:length])
    elif way == "grouped":
        product_MO[:num_rows] = F.grouped_mm(rows_MI[:num_rows].contiguous(), stack_EIO, offs=end_E.to(torch.int32))
    else:
        multiply_segments(rows_MI[:num_rows], stack_EIO, lengths, product_MO[:num_rows])
    return product_MO


@torch.library.custom_op("moevlm::expert_products_weights", mutates_args=())
def _gradient_of_stack(rows_MI: Tensor, gradient_MO: Tensor, end_E: Tensor, way: str) -> Tensor:
    """Return rows_e^T x gradient_e for every segment, (E, I, O)."""
    lengths = _lengths(end_E)
    if way == "padded":
        return torch.bmm(_pad(rows_MI, lengths).transpose(1, 2), _pad(gradient_MO, lengths))
    rows_MI, gradient_MO = rows_MI[: sum(lengths)].contiguous(), gradient_MO[: sum(lengths)].contiguous()
    if way == "grouped":
        return F.grouped_mm(rows_MI.t(), gradient_MO, offs=end_E.to(torch.int32))
    out_EIO = rows_MI.new_empty(end_E.shape[0], rows_MI.shape[1], gradient_MO.shape[1])
    stack_gradient(rows_MI, gradient_MO, lengths, out_EIO)
    return out_EIO


@expert_products.register_fake
def _(rows_MI: Tensor, stack_EIO: Tensor, end_E: Tensor, way: str) -> Tensor:
    return rows_MI.new_empty(rows_MI.shape[0], stack_EIO.shape[2])


@_gradient_of_stack.register_fake
def _(rows_MI: Tensor, gradient_MO: Tensor, end_E: Tensor, way: str) -> Tensor:
    return rows_MI.new_empty(end_E.shape[0], rows_MI.shape[1], gradient_MO.shape[1])


def _keep(ctx, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    rows_MI, stack_EIO, end_E, ctx.way = inputs
    ctx.save_for_backward(rows_MI, stack_EIO, end_E)


def _backward(ctx, gradient_MO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[no-untyped-def]
    rows_MI, stack_EIO, end_E = ctx.saved_tensors
    needs_rows, needs_stack = ctx.needs_input_grad[:2]
    rows = expert_products(gradient_MO, stack_EIO.transpose(1, 2), end_E, ctx.way) if needs_rows else None
    stack = _gradient_of_stack(rows_MI, gradient_MO, end_E, ctx.way) if needs_stack else None
    return rows, stack, None, None


expert_products.register_autograd(_backward, setup_context=_keep)


def run_in_graph(plan: PairPlan, tokens_TD: Tensor, experts: Experts, stacks: tuple[Tensor, ...], way: str) -> Tensor:
    """Run a plan without reading anything on the host but inside of the operator; stacks: in the products' dtype."""
    pairs = sort_by_expert(plan, wait=False)

    def product(rows: Tensor, weight: Tensor, /) -> Tensor:
        return expert_products(rows.to(weight.dtype), weight, pairs.end_E, way)

    rows_MD = experts.run(gather_rows(tokens_TD.to(stacks[0].dtype), pairs), stacks, product)
    # experts may make something of a row of zeros: it weighs nothing, and no gradient comes back through it
    return combine(rows_MD, torch.where(plan.kept_N, plan.weight_N, 0.0), pairs, tokens_TD.dtype)


def _pad(rows_MI: Tensor, lengths: list[int]) -> Tensor:
    """Return the segments in buffers of equal length, (E, C, I)."""
    padded_ECI = rows_MI.new_zeros(len(lengths), max(lengths), rows_MI.shape[1])
    for buffer, length, rows in zip(padded_ECI, lengths, _split(rows_MI, lengths), strict=True):
        buffer[:length] = rows
    return padded_ECI


def _split(rows_MI: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    return rows_MI[: sum(lengths)].split(lengths)


def _lengths(end_E: Tensor) -> list[int]:
    return [end - start for start, end in pairwise([0, *end_E.tolist()])]
