"""Allocates the bytes that decoded images are written to, private or shared between processes."""

from collections.abc import Callable

import torch
from torch import Tensor

Allocate = Callable[[int], Tensor]
"""Returns so many bytes, uint8, of any content."""


def private_bytes(num_bytes: int) -> Tensor:
    """Return ordinary memory."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def shared_bytes(num_bytes: int) -> Tensor:
    """Return new shared memory, all zeros; torch sends it to another process without a copy."""
    storage = torch.UntypedStorage._new_shared(num_bytes, device="cpu")  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(storage)
