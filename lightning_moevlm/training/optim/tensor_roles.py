"""Roles of parameter groups, and norms of tensors that may be stacks of matrices.

A stack (E, in, out) holds the matrices of E experts, routed or shared. Rules per tensor (update clipping, AdaGC,
orthogonalisation) treat it as E tensors: in one norm over the stack, the others would hide a spike of one expert.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Role: TypeAlias = Literal["matrix", "vector", "edge", "router", "expert", "shared"]


def is_stack(group: Mapping[str, Any]) -> bool:
    """Return whether the members of a group are stacks; in groups without a role they are not."""
    return group.get("role") in ("expert", "shared")


def norms(tensors: Sequence[Tensor], stacked: bool) -> list[Tensor]:
    """Return the fp32 Euclidean norm of each tensor, (); of each matrix of a stack, (E, 1, 1)."""
    if stacked:
        return [torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=torch.float32) for stack in tensors]
    # torch refuses an empty list, as the gradients of frozen routers are
    return [norm.float() for norm in torch._foreach_norm(list(tensors))] if tensors else []


def root_mean_squares(tensors: Sequence[Tensor], stacked: bool) -> list[Tensor]:
    """Return the fp32 root mean square of each tensor, (); of each matrix of a stack, (E, 1, 1)."""
    sizes = [tensor[0].numel() if stacked else tensor.numel() for tensor in tensors]
    return [norm / math.sqrt(size) for norm, size in zip(norms(tensors, stacked), sizes, strict=True)]
