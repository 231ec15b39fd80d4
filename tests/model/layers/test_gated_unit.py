"""Bounds of gated units: right by hand, the same on every path, counted, refused where there is no gate."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.model.dispatch import Dispatcher, GroupedDispatcher, LoopDispatcher, SegmentDispatcher
from lightning_moevlm.model.experts import GLU, ClampedGLU, GatedExperts, SiTUGLU, gated_unit
from lightning_moevlm.model.experts.gated_unit import gated_unit_backward
from lightning_moevlm.model.layers import DenseFFN, ModelStabilisers, MoEFFN, gated_parts, initialise
from lightning_moevlm.model.routers import TopKRouter
from tests.counting import kept_bytes
from tests.small_model import pair_batch, small_decoder, small_vl_moe

LAYOUT = Layout((Span(Modality.TEXT, 0, 5),), torch.arange(5).expand(2, 5) < 4)
UNITS = {"plain": None, "clamp": ClampedGLU(1.0), "situ": SiTUGLU(1.5, 2.0)}
each_unit = pytest.mark.parametrize("glu", UNITS.values(), ids=UNITS)


def test_clamp_by_hand() -> None:
    # SiLU(2) = 2 / (1 + e^-2) = 1.761594, SiLU(-3) = -3 / (1 + e^3) = -0.142278; up 5 -> 2, -4 -> -2, 0.5 stays
    gate, up = torch.tensor([9.0, -3.0, 2.0]), torch.tensor([5.0, -4.0, 0.5])
    expected = torch.tensor([1.761594 * 2, -0.142278 * -2, 1.761594 * 0.5])
    torch.testing.assert_close(gated_unit(gate, up, ClampedGLU(2.0)), expected, rtol=1e-5, atol=1e-6)


def test_situ_by_hand() -> None:
    # g = 4, u = 25: 4 tanh(1) sigmoid(4) * 25 tanh(1) = 3.046377 x 0.982014 x 19.039854 = 56.95938
    unit = gated_unit(torch.tensor(4.0), torch.tensor(25.0), SiTUGLU())
    assert float(unit) == pytest.approx(56.95938, rel=1e-5)
    # never above 4 x 25, and the plain unit near 0, up to third order
    assert float(gated_unit(torch.tensor(1e4), torch.tensor(-1e4), SiTUGLU())) == pytest.approx(-100.0)
    small = torch.tensor(1e-2)
    assert float(gated_unit(small, small, SiTUGLU()) / gated_unit(small, small)) == pytest.approx(1, abs=1e-5)


@each_unit
def test_backward_is_that_of_autograd(glu: GLU) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, gradient = (3 * torch.randn(64, dtype=torch.float64, generator=generator) for _ in range(3))
    gate[0], up[1] = 1.0, -1.0  # at the bound the gradient passes
    inputs = (gate.requires_grad_(), up.requires_grad_())
    hidden = gated_unit(*inputs, glu)
    again, found = gated_unit_backward(gradient, gate.detach(), up.detach(), glu)
    torch.testing.assert_close(again, hidden.detach())
    for one, other in zip(found, torch.autograd.grad(hidden, inputs, gradient), strict=True):
        torch.testing.assert_close(one, other)


def gated(glu: GLU, dispatcher: Dispatcher) -> MoEFFN:
    router, experts = partial(TopKRouter, top_k=2), partial(GatedExperts, hidden_dim=24)
    layer = MoEFFN(16, 4, router, experts, dispatcher=dispatcher, shared=experts)
    for part in gated_parts(layer):
        part.glu = glu
    initialise(layer, seed=0, std=0.5)
    return layer


@pytest.mark.parametrize("dispatcher", [SegmentDispatcher(), GroupedDispatcher()], ids=lambda one: type(one).__name__)
@each_unit
def test_every_dispatcher_bounds_alike(glu: GLU, dispatcher: Dispatcher) -> None:
    def run(layer: MoEFFN) -> list[Tensor]:
        tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = layer(tokens, LAYOUT).tokens_BSD
        out.square().sum().backward()
        return [out.detach(), tokens.grad, *(parameter.grad for parameter in layer.parameters())]  # type: ignore[list-item]

    for one, other in zip(run(gated(glu, dispatcher)), run(gated(glu, LoopDispatcher())), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@each_unit
def test_a_compiled_layer_bounds_alike(glu: GLU) -> None:
    layer = gated(glu, SegmentDispatcher())
    tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, LAYOUT).tokens_BSD, layer(tokens, LAYOUT).tokens_BSD)


@each_unit
def test_bf16_stays_within_the_bound(glu: GLU) -> None:
    values = torch.linspace(-60, 60, 121)
    gate, up = (values[:, None].expand(121, 121).bfloat16(), values.expand(121, 121).bfloat16())
    low, high = gated_unit(gate, up, glu), gated_unit(gate.float(), up.float(), glu)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), high, rtol=2e-2, atol=2e-2)
    if glu is not None:
        most = 1.0 if isinstance(glu, ClampedGLU) else 3.0
        assert float(low.abs().max()) <= most


@each_unit
def test_what_a_dense_feed_forward_keeps_is_counted(glu: GLU) -> None:
    ffn = DenseFFN(16, 24, is_gated=True)
    ffn.glu = glu
    tokens = torch.randn(2, 5, 16, requires_grad=True)
    with kept_bytes(ffn) as kept:
        ffn(tokens, LAYOUT)
    assert kept[0] == 4 * ffn.costs({Modality.TEXT: 10}).kept_by_products


def test_a_model_bounds_every_gated_unit_and_starts_from_the_same_weights() -> None:
    plain = small_decoder(is_gated=True)
    bounded = small_decoder(is_gated=True, stabilisers=ModelStabilisers(glu=ClampedGLU(1e-3)))
    kinds = {type(part) for part in gated_parts(bounded)}
    assert kinds == {DenseFFN, GatedExperts} and all(part.glu == ClampedGLU(1e-3) for part in gated_parts(bounded))
    ours, theirs = dict(bounded.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = pair_batch()
    one, other = (model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL).tokens_BSD for model in (plain, bounded))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: small_vl_moe(stabilisers=ModelStabilisers(glu=SiTUGLU())), "this model has none: choose GatedExperts"),
        (lambda: ClampedGLU(0.0), r"stabilisers\.glu\.limit is 0\.0: choose a value above 0"),
        (lambda: SiTUGLU(up_scale=-1.0), r"stabilisers\.glu\.up_scale is -1\.0: choose a value above 0"),
    ],
)
def test_what_cannot_bound_is_refused(build: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()  # type: ignore[operator]


def test_plain_is_swiglu_bit_for_bit() -> None:
    gate, up = torch.randn(7, 5), torch.randn(7, 5)
    assert torch.equal(gated_unit(gate, up), F.silu(gate) * up)
