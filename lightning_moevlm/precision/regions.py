"""Precision by named region: one policy says where a dtype differs from the Trainer's.

The router is the region that matters most: Switch Transformers (arXiv 2101.03961, section 2.4) diverged with a
bf16 router and trained as well as fp32 with a fp32 router inside a bf16 trunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RegionDtype = Literal["float32", "bfloat16", "float16"]
"""A dtype that a region may be pinned to."""


@dataclass(frozen=True)
class PrecisionPolicy:
    """The dtype of each region; null follows the Trainer's precision.

    Args:
        router: dtype of the router's matrix product. Softmax, top-k and the losses on logits are always fp32.
    """

    router: RegionDtype | None = "float32"


@contextmanager
def region(dtype: RegionDtype | None, device_type: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """Compute a block in `dtype`: autocast is off inside, and the yielded function casts tensors on their way in.

    With dtype None nothing changes and the function returns its argument.
    """
    if dtype is None:
        yield lambda tensor: tensor
        return
    target: torch.dtype = getattr(torch, dtype)
    with torch.autocast(device_type, enabled=False):
        yield lambda tensor: tensor.to(target)
