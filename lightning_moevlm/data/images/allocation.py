"""Allocates the bytes that decoded images are written to, private or shared between processes."""

from collections.abc import Callable

import torch
from torch import Tensor

Allocate = Callable[[int], Tensor]
"""From a number of bytes to that many, uint8, of any content."""


def private_bytes(num_bytes: int) -> Tensor:
    """Return ordinary memory."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def shared_bytes(num_bytes: int) -> Tensor:
    """Return fresh shared memory, all zeros: what torch sends to another process without copying it."""
    storage = torch.UntypedStorage._new_shared(num_bytes, device="cpu")  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(storage)
