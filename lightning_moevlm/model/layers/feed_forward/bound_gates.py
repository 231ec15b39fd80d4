"""Bounds the gated units of a model: the switch `stabilisers.glu` (see `experts/gated_unit.py`)."""

from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.experts import GLU, GatedExperts
from lightning_moevlm.model.layers.feed_forward.dense import DenseFFN

GatedPart = GatedExperts | DenseFFN
"""A module with a gated unit of its own."""


def gated_parts(module: nn.Module) -> list[GatedPart]:
    """Return the gated experts, routed or shared, and the gated dense feed-forwards of a module."""
    return [
        part
        for part in module.modules()
        if isinstance(part, GatedExperts) or (isinstance(part, DenseFFN) and part.gate is not None)
    ]


def bound_gates(backbone: nn.Module, glu: GLU) -> None:
    """Bound every gated unit of a backbone; None leaves SwiGLU.

    Raises:
        UserError: a bound, and no gated unit.
    """
    if glu is None:
        return
    parts = gated_parts(backbone)
    if not parts:
        raise UserError(
            "stabilisers.glu bounds gated feed-forwards, and this model has none: choose GatedExperts as experts of "
            "moe (of a MoEDecoder also is_gated true), or set model.backbone.init_args.stabilisers.glu to null"
        )
    for part in parts:
        part.glu = glu
