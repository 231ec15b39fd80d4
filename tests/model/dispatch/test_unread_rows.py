"""GroupedDispatcher as it runs off the CPU: rows behind the last offset are memory that nobody has written.

A stand-in of the kernel fills them with NaN, in what it returns and in the gradient of its rows, and never reads them.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch import GroupedDispatcher, LoopDispatcher, grouped_mm
from lightning_moevlm.model.experts import ExpertStack, GatedExperts, MLPExperts
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.layers.feed_forward.sub_norm import SubNormedExperts
from lightning_moevlm.model.layers.norms import make_norm
from lightning_moevlm.model.precision import PrecisionPolicy
from tests.model.dispatch.test_fast_paths import BiasedExperts, gradients, plans
from tests.routing import routing_input


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows_MI: Tensor, stack_EIO: Tensor, offset_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_MI, stack_EIO, offset_E)
        return _fill(rows_MI, stack_EIO, offset_E)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient_MO: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_MI, stack_EIO, offset_E = ctx.saved_tensors  # type: ignore[attr-defined]
        segments = [rows_MI[here].t() @ gradient_MO[here] for here in _segments(offset_E)]
        return _fill(gradient_MO, stack_EIO.transpose(1, 2), offset_E), torch.stack(segments), None


def _segments(offset_E: Tensor) -> Iterator[slice]:
    ends = offset_E.tolist()
    return map(slice, [0, *ends], ends)


def _fill(rows_MI: Tensor, stack_EIO: Tensor, offset_E: Tensor) -> Tensor:
    product_MO = rows_MI.new_full((rows_MI.shape[0], stack_EIO.shape[2]), torch.nan)
    for here, matrix_IO in zip(_segments(offset_E), stack_EIO, strict=True):
        product_MO[here] = rows_MI[here] @ matrix_IO
    return product_MO


class _Normed(nn.Module):
    """Experts with a norm whose scale all rows share, so that its gradient is a sum over rows."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.experts, self.norm = MLPExperts(dim, num_experts, 32), make_norm("layer", 32)
        normed = SubNormedExperts(self.experts, self.norm, PrecisionPolicy())
        self.stacks, self.run, self.activation = normed.stacks, normed.run, normed.activation


@pytest.fixture
def unwritten_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "grouped_mm", lambda rows, stack, offs: _Kernel.apply(rows, stack, offs))
    monkeypatch.setattr(grouped_mm, "_is_read_at_once", lambda tokens_TD: False)


@pytest.mark.usefixtures("unwritten_rows")
@pytest.mark.parametrize("kind", [MLPExperts, GatedExperts, BiasedExperts, _Normed])
@pytest.mark.parametrize("plan", plans())
def test_nothing_unwritten_reaches_values_or_gradients(plan: str, kind: Callable[[int, int], ExpertStack]) -> None:
    experts = kind(16, 8)
    initialise(experts, seed=2, std=0.3)
    tokens_TD = routing_input(48, 16, num_padding=5).tokens_TD
    expected = gradients(LoopDispatcher(), experts, plans()[plan], tokens_TD)
    actual = gradients(GroupedDispatcher(), experts, plans()[plan], tokens_TD)
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("unwritten_rows")
def test_experts_with_an_activation_need_two_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    # one on the way in, one on the way out, none of the hidden units; with a bias each of three products has its two
    counted: list[tuple[int, ...]] = []
    mask = grouped_mm._mask
    monkeypatch.setattr(grouped_mm, "_mask", lambda rows, kept_M1: counted.append(rows.shape) or mask(rows, kept_M1))
    plan: PairPlan = plans()["capacity"]
    for kind, number in ((MLPExperts, 2), (GatedExperts, 2), (BiasedExperts, 8)):
        counted.clear()
        GroupedDispatcher()(plan, routing_input(48, 16).tokens_TD, kind(16, 8))  # type: ignore[call-arg, operator]
        assert len(counted) == number
        assert number > 2 or counted == [(96, 16)] * 2
