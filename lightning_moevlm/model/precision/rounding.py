"""Rounding to a narrower floating-point format and back, with fp32 around it and a straight-through gradient.

    round(x) = x cast to the format, nearest and ties to even, and cast back;   d round(x) / dx = 1

| format        | mantissa bits | largest | step at 1 |
|---------------|---------------|---------|-----------|
| bfloat16      | 7             | 3.4e38  | 2^-7      |
| float16       | 10            | 65504   | 2^-10     |
| float8_e4m3fn | 3             | 448     | 2^-3      |
| float8_e5m2   | 2             | 57344   | 2^-2      |

The casts are torch's own. fp8 formats saturate (arXiv 2209.05433, section 3); float16 overflows to infinity, as it does
in a real product. Infinities and NaN pass unchanged through every format, so that a divergence stays one.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_moevlm.model.precision.policy import RegionDtype

_SATURATING = ("float8_e4m3fn", "float8_e5m2")


def rounded(values: Tensor, dtype: RegionDtype, scale: bool = False) -> Tensor:
    """Round to the nearest number of a format; returns the dtype of the values, no gradient of its own.

    Args:
        values: float32 or float64, any shape.
        dtype: the format; float32 rounds to fp32, which leaves fp32 alone.
        scale: fp8 alone: let the largest finite magnitude of the tensor be the largest number of the format.
    """
    target: torch.dtype = getattr(torch, dtype)
    if dtype not in _SATURATING:
        return values.to(target).to(values.dtype)
    largest = torch.finfo(target).max
    finite = values.isfinite()
    if scale and values.numel():
        peak = torch.where(finite, values, 0.0).abs().amax()
        factor = largest / peak.clamp(min=1e-30)  # the bound keeps the factor of a tensor of zeros finite
        narrow = (values * factor).clamp(-largest, largest).to(target)
        return torch.where(finite, narrow.to(values.dtype) / factor, values)
    return torch.where(finite, values.clamp(-largest, largest).to(target).to(values.dtype), values)


def straight_through(values: Tensor, dtype: RegionDtype, scale: bool, gradients: bool) -> Tensor:
    """Round as `rounded` does; the gradient passes, rounded too if `gradients` is true."""
    result: Tensor = _StraightThrough.apply(values, dtype, scale, gradients)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: RegionDtype, scale: bool, gradients: bool) -> Tensor:
        ctx.dtype, ctx.scale, ctx.gradients = dtype, scale, gradients
        return rounded(values, dtype, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.gradients:
            dtype: RegionDtype = "float8_e5m2" if ctx.dtype == "float8_e4m3fn" else ctx.dtype
            gradient = rounded(gradient, dtype, ctx.scale)
        return gradient, None, None, None
