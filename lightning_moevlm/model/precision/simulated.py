"""Arithmetic of a narrower format, computed in fp32: every operand and every result is rounded.

A mode of torch functions, so layers, dispatchers and routers need no code for it. It rounds as autocast casts: the
functions below are caught, everything between them (sums, residuals, softmax of a
router) stays fp32. The gradient of a custom autograd function is that function's own and is not rounded.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_moevlm.model.precision.policy import RegionDtype, Simulation
from lightning_moevlm.model.precision.rounding import straight_through

_PRODUCTS = {
    F.linear,
    F.bilinear,
    F.conv2d,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
    Tensor.addmm,
    F.grouped_mm,
}
_ELEMENTWISE = {F.gelu, F.silu, F.relu}
_NORMS = {F.layer_norm, F.rms_norm}
_LOSSES = {F.cross_entropy, F.mse_loss}
_ROUNDED = _PRODUCTS | _ELEMENTWISE | _NORMS | _LOSSES | {F.embedding, F.scaled_dot_product_attention}


class SimulatedArithmetic(TorchFunctionMode):
    """Rounds what the caught functions read and write; the innermost mode alone acts.

    Args:
        dtype: the format; None computes in fp32 and only keeps an outer mode away.
        simulation: gradients and scale.
    """

    def __init__(self, dtype: RegionDtype | None, simulation: Simulation) -> None:
        super().__init__()
        self.dtype = dtype
        self.simulation = simulation

    def round(self, values: Tensor) -> Tensor:
        """Round a tensor, widened to fp32 first where it is narrower; integers and None pass."""
        if not values.is_floating_point():
            return values
        wide = values if values.dtype == torch.float64 else values.float()
        if self.dtype is None:
            return wide
        return straight_through(wide, self.dtype, self.simulation.scale, self.simulation.gradients)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _ROUNDED:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # an outer mode must not round again
            if func is F.embedding:  # rows of a table: rounding them is rounding what comes out
                return self.round(func(*args, **kwargs))
            out = kwargs.pop("out", None)
            args, kwargs = tree_map(self._round_leaf, (args, kwargs))
            if func is F.scaled_dot_product_attention and self.dtype is not None:
                return self._attention(*args, **kwargs)
            result = self.round(func(*args, **kwargs))
            return result if out is None else out.copy_(result)

    def _round_leaf(self, leaf: object) -> object:
        return self.round(leaf) if isinstance(leaf, Tensor) else leaf

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention in the open: a fused kernel would keep its logits to itself."""
        assert not enable_gqa, "grouped queries are not simulated"
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        logits = self.round(query @ key.transpose(-2, -1) * scale)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attn_mask is not None:
            masks = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -torch.inf) if masks else logits + attn_mask
        probs = self.round(logits.softmax(dim=-1))
        return self.round(F.dropout(probs, dropout_p) @ value)
