"""The gated unit of a feed-forward, h = SiLU(gate) * up, plain or bounded.

    plain    h = SiLU(g) u                                            SwiGLU, Shazeer 2020 (arXiv 2002.05202)
    clamp    h = SiLU(min(g, c)) max(-c, min(u, c))                   DeepSeek-V4, section 4.2.3, c = 10
    SiTU     h = (a tanh(g / a) sigmoid(g)) (b tanh(u / b))           Kimi K3, section 2.3.2, equation 12, a = 4, b = 25

Both factors of the plain unit grow without limit, and their product is where outliers of MoE layers arise, which loss
spikes follow (DeepSeek-V4). The clamp cuts them off: beyond it there is no gradient. SiTU bends: |h| < a b, the
gradient is never 0, and near 0 it is the plain unit up to third order.

gpt-oss clamps alike with c = 7, but its unit is another one, g sigmoid(1.702 g) (u + 1), which is not here. The reports
of DeepSeek-V4 and Kimi K3 were read in notes about them, not in the original.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.common.number_checks import check_number


@dataclass(frozen=True)
class ClampedGLU:
    """Clamps both factors of gated feed-forwards.

    Args:
        limit: c: the gate is at most c before its SiLU, the other factor between -c and c; 10 in DeepSeek-V4.

    Raises:
        UserError: a limit that is not positive.
    """

    limit: float = 10.0

    def __post_init__(self) -> None:
        """Check ranges."""
        check_number("stabilisers.glu.limit", self.limit, above=0, advice="; 10 in DeepSeek-V4, or glu null for none")


@dataclass(frozen=True)
class SiTUGLU:
    """Bends both factors of gated feed-forwards by tanh.

    Args:
        gate_scale: a, the bound of the gate; 4 in Kimi K3.
        up_scale: b, the bound of the other factor; 25 in Kimi K3.

    Raises:
        UserError: a scale that is not positive.
    """

    gate_scale: float = 4.0
    up_scale: float = 25.0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("gate_scale", "up_scale"):
            check_number(f"stabilisers.glu.{name}", getattr(self, name), above=0, advice=", or glu null for none")


GLU = ClampedGLU | SiTUGLU | None
"""The bound of a gated unit; None is SwiGLU."""


def gated_unit(gate_NF: Tensor, up_NF: Tensor, glu: GLU = None) -> Tensor:
    """Return h, (N, F) in the inputs' dtype."""
    match glu:
        case None:
            return F.silu(gate_NF) * up_NF
        case ClampedGLU():
            return F.silu(gate_NF.clamp(max=glu.limit)) * up_NF.clamp(-glu.limit, glu.limit)
    bent_NF = glu.gate_scale * torch.tanh(gate_NF / glu.gate_scale) * torch.sigmoid(gate_NF)
    return bent_NF * (glu.up_scale * torch.tanh(up_NF / glu.up_scale))


def gated_unit_backward(
    gradient_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, glu: GLU = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return h again, and the gradients of gate and up."""
    if isinstance(glu, SiTUGLU):
        return _situ_backward(gradient_NF, gate_NF, up_NF, glu)
    if glu is None:
        passed_NF, factor_NF = gate_NF, up_NF
    else:
        passed_NF, factor_NF = gate_NF.clamp(max=glu.limit), up_NF.clamp(-glu.limit, glu.limit)
    activated_NF = F.silu(passed_NF)
    gate_gradient_NF = torch.ops.aten.silu_backward(gradient_NF * factor_NF, passed_NF)
    up_gradient_NF = gradient_NF * activated_NF
    if glu is not None:  # as torch's clamp: at the bound the gradient passes
        gate_gradient_NF = gate_gradient_NF.masked_fill_(gate_NF > glu.limit, 0)
        up_gradient_NF = up_gradient_NF.masked_fill_(up_NF.abs() > glu.limit, 0)
    return activated_NF * factor_NF, (gate_gradient_NF, up_gradient_NF)


def kept_by_unit(glu: GLU) -> int:
    """Return how many tensors (N, F) autograd keeps of a unit that is written out, with its result."""
    if glu is None:
        return 4  # g, SiLU, u, h
    return 6 if isinstance(glu, ClampedGLU) else 7  # and the clamped ones; three of each bent factor, and sigmoid


def _situ_backward(
    gradient_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, glu: SiTUGLU
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    gate_tanh_NF, up_tanh_NF = torch.tanh(gate_NF / glu.gate_scale), torch.tanh(up_NF / glu.up_scale)
    open_NF = torch.sigmoid(gate_NF)
    bent_NF, factor_NF = glu.gate_scale * gate_tanh_NF * open_NF, glu.up_scale * up_tanh_NF
    slope_NF = (1 - gate_tanh_NF.square()) * open_NF + bent_NF * (1 - open_NF)
    return bent_NF * factor_NF, (
        gradient_NF * factor_NF * slope_NF,
        gradient_NF * bent_NF * (1 - up_tanh_NF.square()),
    )
