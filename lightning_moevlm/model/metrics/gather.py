"""Gathers what each rank has measured; all ranks must ask together."""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def gather_objects(own: _T) -> list[_T]:
    """Return the objects of all ranks, in their order; this one alone without a process group."""
    everyone = [own]
    if dist.is_available() and dist.is_initialized():
        everyone = [own] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    return everyone


def own_share(rows: Sequence[int], able: bool = True) -> list[int]:
    """Return every n-th row, for this one of the n ranks that are able to work; all ranks must ask together."""
    working = [rank for rank, can in enumerate(gather_objects(able)) if can]
    own = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return list(rows[working.index(own) :: len(working)]) if own in working else []
