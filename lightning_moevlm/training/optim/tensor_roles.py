"""What the members of an optimiser's parameter group are, and the norm of a tensor that may be a stack of matrices.

A stack (E, in, out) holds the matrices of E experts, routed or shared. Rules per tensor (update clipping, AdaGC,
orthogonalisation) treat it as E tensors, which it would be were the experts modules of their own: in one norm over the
stack, a spike of one expert would drown in the others.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Role: TypeAlias = Literal["matrix", "vector", "edge", "router", "expert", "shared"]


def is_stack(group: Mapping[str, Any]) -> bool:
    """Return whether the members of a group are stacks; groups without a role hold none."""
    return group.get("role") in ("expert", "shared")


def norms(tensors: Sequence[Tensor], stacked: bool) -> list[Tensor]:
    """Return the fp32 Euclidean norm of each tensor, (); of each matrix of a stack, (E, 1, 1)."""
    if stacked:
        return [torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=torch.float32) for stack in tensors]
    # torch refuses an empty list, which is what a group of frozen routers has for gradients
    return [norm.float() for norm in torch._foreach_norm(list(tensors))] if tensors else []


def root_mean_squares(tensors: Sequence[Tensor], stacked: bool) -> list[Tensor]:
    """Return the fp32 root mean square of each tensor, (); of each matrix of a stack, (E, 1, 1)."""
    sizes = [tensor[0].numel() if stacked else tensor.numel() for tensor in tensors]
    return [norm / math.sqrt(size) for norm, size in zip(norms(tensors, stacked), sizes, strict=True)]
