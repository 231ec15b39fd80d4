"""Rounding to narrow formats: numbers written out by hand, and torch's own casts and products as reference."""

import math

import pytest
import torch
from torch import Tensor

from lightning_moevlm.model.precision import RegionDtype, rounded, straight_through

FORMATS: tuple[RegionDtype, ...] = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        # bf16 has 7 bits behind the point: the numbers next to 1 are 1 + 2^-7 and 1 - 2^-8
        ("bfloat16", 1 + 2**-9, 1.0),
        ("bfloat16", 1 + 2**-7, 1 + 2**-7),
        ("bfloat16", 1 + 2**-8, 1.0),  # half-way, to the even 1
        ("bfloat16", 1 + 3 * 2**-8, 1 + 2**-6),  # half-way between 1 + 2^-7 and 1 + 2^-6, to the even one
        ("bfloat16", 1 + 2**-8 + 2**-20, 1 + 2**-7),  # above half-way
        ("bfloat16", 257.0, 256.0),  # why counters are integers
        ("float16", 1 + 2**-9, 1 + 2**-9),
        ("float16", 1 + 2**-11, 1.0),
        ("float16", 2049.0, 2048.0),
        ("float16", 65504.0, 65504.0),
        ("float16", 70000.0, math.inf),  # overflows as the real format does
        ("float8_e4m3fn", 1.0625, 1.0),  # step 1/8 at 1, half-way to the even 1
        ("float8_e4m3fn", 1.1, 1.125),
        ("float8_e4m3fn", 448.0, 448.0),
        ("float8_e4m3fn", 1000.0, 448.0),  # saturates
        ("float8_e4m3fn", -1000.0, -448.0),
        ("float8_e4m3fn", 2**-9, 2**-9),  # the smallest
        ("float8_e4m3fn", 2**-10, 0.0),  # half of it, to the even 0
        ("float8_e5m2", 1.1, 1.0),  # step 1/4 at 1
        ("float8_e5m2", 1.2, 1.25),
        ("float8_e5m2", 1e6, 57344.0),  # saturates
        ("float32", 1 + 2**-9, 1 + 2**-9),
    ],
)
def test_by_hand(dtype: RegionDtype, value: float, expected: float) -> None:
    assert rounded(torch.tensor([value]), dtype).tolist() == [expected]


def test_a_scaled_tensor_uses_the_whole_range() -> None:
    # the largest, 2000, becomes 448 and comes back; 1000 becomes 224 = 1.75 * 2^7, exact; 10 becomes 2.24, nearest to
    # 2.25: 2.25 * 2000 / 448 = 10.0446
    values = torch.tensor([2000.0, 1000.0, 10.0])
    torch.testing.assert_close(rounded(values, "float8_e4m3fn", scale=True), torch.tensor([2000.0, 1000.0, 10.044643]))
    assert rounded(values, "float8_e4m3fn").tolist() == [448.0, 448.0, 10.0]
    # and a tiny one is not lost below the smallest number
    tiny = torch.tensor([1e-6, 5e-7])
    torch.testing.assert_close(rounded(tiny, "float8_e4m3fn", scale=True), tiny)
    assert rounded(tiny, "float8_e4m3fn").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scale", [True, False])
def test_zeros_nothing_infinities_and_nan_pass(dtype: RegionDtype, scale: bool) -> None:
    assert rounded(torch.zeros(3), dtype, scale).tolist() == [0.0] * 3
    assert rounded(torch.zeros(0), dtype, scale).tolist() == []
    result = rounded(torch.tensor([math.inf, -math.inf, math.nan, 1.0]), dtype, scale)
    assert result[:2].tolist() == [math.inf, -math.inf] and bool(result[2].isnan()) and float(result[3]) == 1.0


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_twice_is_rounding_once_and_is_torchs_cast(dtype: RegionDtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    once = rounded(values, dtype)
    assert torch.equal(once, values.to(getattr(torch, dtype)).float())
    assert torch.equal(rounded(once, dtype), once)
    assert not torch.equal(once, values)


def gradient(dtype: RegionDtype, scale: bool, gradients: bool, incoming: Tensor) -> Tensor:
    values = torch.full_like(incoming, 1000.0, requires_grad=True)
    straight_through(values, dtype, scale, gradients).backward(incoming)
    assert values.grad is not None
    return values.grad


def test_gradient_is_straight_through_and_rounded_on_request() -> None:
    incoming = torch.tensor([1 + 2**-9, 1.1, 500.0])
    for dtype in FORMATS:  # 1000 saturates e4m3: the gradient passes all the same
        assert torch.equal(gradient(dtype, False, False, incoming), incoming)
    assert gradient("bfloat16", False, True, incoming).tolist() == [1.0, 1.1015625, 500.0]
    # gradients of e4m3 are e5m2: 1.1 to 1.0, 500 to 512
    assert gradient("float8_e4m3fn", False, True, incoming).tolist() == [1.0, 1.0, 512.0]
