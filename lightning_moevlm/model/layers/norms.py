"""The norms of a trunk, by name, in the dtype that the precision policy has for them.

layer              (x - mean) / std * g + b            Ba et al. 2016 (arXiv 1607.06450)
rms                x / rms(x) * g                      Zhang and Sennrich 2019 (arXiv 1910.07467)
rms_without_scale  x / rms(x)                          an ablation of ST-MoE (arXiv 2202.08906, section 3.3): steadier
                                                       and of lower quality there
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.model.precision import PrecisionPolicy, region

NormKind = Literal["layer", "rms", "rms_without_scale"]
"""Kind of a norm."""

_EPS = 1e-6  # of RMS norms; nn.LayerNorm keeps torch's 1e-5


def make_norm(kind: NormKind, dim: int) -> nn.Module:
    """Return a norm over the last axis of width `dim`; apply it with `normalise`."""
    if kind == "layer":
        return nn.LayerNorm(dim)
    return nn.RMSNorm(dim, eps=_EPS, elementwise_affine=kind == "rms")


def normalise(values: Tensor, norm: nn.Module | None, precision: PrecisionPolicy) -> Tensor:
    """Apply a norm, None being no norm; where the policy pins norms, return the dtype of the values.

    Where it does not, a LayerNorm gives what torch makes of it, and an RMS norm the dtype of its input: under autocast
    the fused RMS kernel refuses a fp32 weight with a bf16 input.
    """
    if norm is None:
        return values
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    if precision.dtype_of("norms") is None:
        # a region around it may compute in another dtype than bf16-true has cast the norm to
        is_cast = norm.weight is not None and norm.weight.dtype not in (values.dtype, torch.float32)
        return _apply(values, norm) if is_cast or isinstance(norm, nn.RMSNorm) else norm(values)
    device_type = values.device.type
    # autocast lifts a norm to fp32 on CUDA; a region has its own dtype
    with region(precision, "norms", device_type) as cast, torch.autocast(device_type, enabled=False):
        return _apply(cast(values), norm).to(values.dtype)


def _apply(values: Tensor, norm: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    """Apply a norm with its parameters in the dtype of the values."""
    weight = None if norm.weight is None else norm.weight.to(values.dtype)
    shape = tuple(norm.normalized_shape)
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(values, shape, weight, norm.eps)
    bias = None if norm.bias is None else norm.bias.to(values.dtype)
    return F.layer_norm(values, shape, weight, bias, norm.eps)
