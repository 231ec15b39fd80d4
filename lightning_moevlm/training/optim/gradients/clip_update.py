"""Clips the update of any optimiser (Adafactor, arXiv 1804.04235, section 6).

    u = (old - new) / lr,     p = old + (new - old) / max(1, rms(u) / threshold)

rms is the root mean square over the tensor, or over each matrix of a stack.
"""

import torch
from torch import Tensor

from lightning_moevlm.training.optim.tensor_roles import root_mean_squares


def clip_update_(params: list[Tensor], old: list[Tensor], lr: float, threshold: float, stacked: bool) -> list[Tensor]:
    """Shorten updates in place; short ones stay bit for bit.

    Returns:
        For each parameter a bool scalar, whether it was shortened; empty if nothing moved.
    """
    if lr == 0:
        return []
    acted = []
    rms = root_mean_squares(torch._foreach_sub(params, old), stacked)
    for p, before, size in zip(params, old, rms, strict=True):
        taken = 1 / (size / (lr * threshold)).clamp(min=1.0)
        p.lerp_(before, (1 - taken).to(p.dtype))
        acted.append((taken < 1).any())
    return acted
