"""The norms of a trunk, by name.

layer              (x - mean) / std * g + b            Ba et al. 2016 (arXiv 1607.06450)
rms                x / rms(x) * g                      Zhang and Sennrich 2019 (arXiv 1910.07467)
rms_without_scale  x / rms(x)                          an ablation of ST-MoE (arXiv 2202.08906, section 3.3): steadier
                                                       and of lower quality there
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["layer", "rms", "rms_without_scale"]
"""Which norm."""

_EPS = 1e-6  # of RMS norms; nn.LayerNorm keeps torch's 1e-5


def make_norm(kind: NormKind, dim: int) -> nn.Module:
    """Return a norm over the last axis of width `dim`; apply it with `normalised`."""
    if kind == "layer":
        return nn.LayerNorm(dim)
    return nn.RMSNorm(dim, eps=_EPS, elementwise_affine=kind == "rms")


def normalised(values: Tensor, norm: nn.Module | None) -> Tensor:
    """Apply a norm, None being no norm; an RMS norm in the dtype of its input.

    Under autocast the fused RMS kernel refuses a fp32 weight with a bf16 input.
    """
    if isinstance(norm, nn.RMSNorm):
        weight = None if norm.weight is None else norm.weight.to(values.dtype)
        return F.rms_norm(values, tuple(norm.normalized_shape), weight, norm.eps)
    return values if norm is None else norm(values)
