"""Gathers what each rank has measured; all ranks must ask together."""

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
