"""Simulated arithmetic against the real one, and against nothing at all where it is off."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_moevlm.model.dispatch import Dispatcher, GroupedDispatcher, LoopDispatcher, SegmentDispatcher
from lightning_moevlm.model.precision import (
    PrecisionPolicy,
    RegionDtype,
    SimulatedArithmetic,
    Simulation,
    region,
    rounded,
    set_precision,
)
from tests.small_model import pair_batch, small_vl_moe

BF16 = PrecisionPolicy(trunk="bfloat16", router=None, simulate=Simulation())


def operands(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: torch.matmul(x, w.t()),
    "@": lambda x, w: x @ w.t(),
    "mm method": lambda x, w: x.mm(w.t()),
    "einsum": lambda x, w: torch.einsum("td,ed->te", x, w),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_simulated_product_is_the_real_one_within_a_rounding(product: str, dtype: RegionDtype) -> None:
    x, w = operands((32, 64), (16, 64))
    real = PRODUCTS[product](x.to(getattr(torch, dtype)), w.to(getattr(torch, dtype))).float()
    with SimulatedArithmetic(dtype, Simulation()):
        simulated = PRODUCTS[product](x, w)
    assert simulated.dtype == torch.float32
    # both round a fp32 sum of exact products once; the order of summation may tip a tie: one step of the format
    step = torch.finfo(getattr(torch, dtype)).eps
    torch.testing.assert_close(simulated, real, rtol=step, atol=step * 2**-4)
    assert float((simulated == real).float().mean()) > 0.95
    assert torch.equal(simulated, rounded(simulated, dtype))
    assert not torch.equal(simulated, PRODUCTS[product](x, w))


def test_by_hand() -> None:
    # 1 + 2^-9 becomes 1 in bf16, so 256 of them sum to 256 and not to 256.5
    x, w = torch.full((1, 256), 1 + 2**-9), torch.ones(1, 256)
    assert F.linear(x, w).item() == 256.5
    with SimulatedArithmetic("bfloat16", Simulation()):
        assert F.linear(x, w).item() == 256.0
        assert F.linear(torch.ones(1, 257), torch.ones(1, 257)).item() == 256.0  # the result is rounded too


def test_norm_activation_and_attention_agree_with_the_real_ones() -> None:
    (x,) = operands((2, 3, 5, 8))
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda t: F.layer_norm(t, (8,)),
        lambda t: F.rms_norm(t, (8,)),
        F.gelu,
        F.silu,
        lambda t: F.scaled_dot_product_attention(t, t, t),
        lambda t: F.scaled_dot_product_attention(t, t, t, is_causal=True),
    ]
    for function in functions:
        with SimulatedArithmetic("bfloat16", Simulation()):
            simulated = function(x)
        torch.testing.assert_close(simulated, function(x.bfloat16()).float(), rtol=2**-6, atol=2**-6)
        assert torch.equal(simulated, simulated.bfloat16().float()) and not torch.equal(simulated, function(x))


def test_attention_of_a_wide_format_is_torchs() -> None:
    (x,) = operands((2, 3, 5, 8))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, :, :, 3:] = False
    expected = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    wide = SimulatedArithmetic(None, Simulation())
    with wide:
        assert torch.equal(F.scaled_dot_product_attention(x, x, x, attn_mask=mask), expected)
    # the one in the open, which narrow formats take
    torch.testing.assert_close(wide._attention(x, x, x, attn_mask=mask), expected)
    added = torch.zeros(2, 1, 1, 5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(wide._attention(x, x, x, attn_mask=added), expected)
    torch.testing.assert_close(
        wide._attention(x, x, x, is_causal=True, scale=0.5),
        F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5),
    )


def test_gradient_flows_through_rounded_operands() -> None:
    x, w = (tensor.requires_grad_() for tensor in operands((4, 8), (3, 8)))
    with SimulatedArithmetic("bfloat16", Simulation()):
        F.linear(x, w).sum().backward()
    # d sum / dw = sum of the rounded x, unrounded itself
    assert w.grad is not None
    torch.testing.assert_close(w.grad, x.detach().bfloat16().float().sum(0).expand(3, 8))
    w.grad = None
    with SimulatedArithmetic("bfloat16", Simulation(gradients=True)):
        F.linear(x, w).sum().backward()
    assert torch.equal(w.grad, w.grad.bfloat16().float())


def test_out_arguments_are_written() -> None:
    x, w = operands((4, 8), (8, 3))
    out = torch.empty(4, 3)
    with SimulatedArithmetic("bfloat16", Simulation()):
        assert torch.mm(x, w, out=out) is out
        torch.testing.assert_close(out, torch.mm(x, w))


def test_the_inner_region_decides() -> None:
    x, w = operands((4, 8), (3, 8))
    policy = PrecisionPolicy(trunk="float8_e5m2", router="float32", experts="bfloat16", simulate=Simulation())
    exact = F.linear(x, w)
    with region(policy, "trunk", "cpu"):
        coarse = F.linear(x, w)
        with region(policy, "router", "cpu"):
            assert torch.equal(F.linear(x, w), exact)
        with region(policy, "experts", "cpu"):
            fine = F.linear(x, w)
        with region(policy, "norms", "cpu"):  # not pinned: as around it
            assert torch.equal(F.linear(x, w), coarse)
        assert torch.equal(F.linear(x, w), coarse)
    assert torch.equal(F.linear(x, w), exact)
    assert float((coarse - exact).abs().mean()) > 4 * float((fine - exact).abs().mean()) > 0


def features(policy: PrecisionPolicy, dispatcher: Dispatcher | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    model, batch = small_vl_moe(dispatcher=dispatcher), pair_batch()
    set_precision(model, policy)
    tokens_BSD = model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL).tokens_BSD
    tokens_BSD.square().sum().backward()
    return tokens_BSD.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_off_is_bit_equal() -> None:
    # null everywhere, fp32 everywhere, and fp32 under a simulation of nothing
    plain, gradients = features(PrecisionPolicy(router=None, losses=None))
    for policy in (PrecisionPolicy(), PrecisionPolicy(trunk="float32", experts="float32", norms="float32")):
        tokens, others = features(policy)
        assert torch.equal(tokens, plain)
        assert all(torch.equal(others[name], gradients[name]) for name in gradients)
    for policy in (PrecisionPolicy(simulate=Simulation()), PrecisionPolicy(trunk="float32", simulate=Simulation())):
        tokens, others = features(policy)
        assert torch.equal(tokens, plain)
        assert all(torch.equal(others[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("dispatcher", [LoopDispatcher(), SegmentDispatcher(), GroupedDispatcher()])
def test_a_model_in_simulated_bf16_is_near_the_real_one(dispatcher: Dispatcher) -> None:
    # the same tokens go to the same experts, and features differ from those of autocast by a few steps of bf16
    plain, _ = features(PrecisionPolicy(router=None), dispatcher)
    simulated, gradients = features(BF16, dispatcher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real, _ = features(PrecisionPolicy(router=None), dispatcher)
    noise = float((simulated - plain).square().mean().sqrt())
    assert 1e-4 < noise < 2e-2
    assert noise == pytest.approx(float((real.float() - plain).square().mean().sqrt()), rel=0.5)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert all(float(gradient.abs().sum()) > 0 for name, gradient in gradients.items() if "experts" in name)


def test_recomputation_rounds_again() -> None:
    # activation checkpointing runs a block a second time, in the backward pass and outside of every region above it
    results = []
    for recompute in (False, True):
        model, batch = small_vl_moe(), pair_batch()
        set_precision(model, BF16)
        if recompute:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        tokens_BSD = model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL).tokens_BSD
        tokens_BSD.square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


def test_nothing_but_the_pinned_region_changes() -> None:
    # experts alone in e4m3: the plan of the first sparse layer is that of fp32 to the bit, its result is not
    model, batch = small_vl_moe(), pair_batch()
    arguments = (batch.images_BRYX, batch.text_BL, batch.text_mask_BL)
    plain = model(*arguments)
    set_precision(model, PrecisionPolicy(experts="float8_e4m3fn", simulate=Simulation()))
    coarse = model(*arguments)
    for before, after in zip(plain.plans, coarse.plans, strict=True):
        assert torch.equal(before.plan.logits_TE, after.plan.logits_TE)
    assert not torch.equal(plain.tokens_BSD, coarse.tokens_BSD)


def test_a_linear_layer_knows_nothing_of_it() -> None:
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.fill_(1 + 2**-9)
        layer.bias.zero_()
    with region(BF16, "trunk", "cpu"):
        assert layer(torch.ones(1, 8)).tolist() == [[8.0] * 4]
    assert layer.weight[0, 0].item() == 1 + 2**-9  # weights themselves are not rounded
