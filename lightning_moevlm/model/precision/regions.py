"""Enters regions, and gives the whole model its precision policy.

A layer with a region of its own holds the policy in the attribute `precision` and computes the region inside
`region(...)`. The policy is set once for all of them, by `set_precision`; nothing else carries it, so no two layers can
disagree.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_moevlm.model.precision.policy import PrecisionPolicy, Region
from lightning_moevlm.model.precision.simulated import SimulatedArithmetic

Cast = Callable[[Tensor], Tensor]
"""The conversion of a tensor that enters a region."""


@contextmanager
def region(policy: PrecisionPolicy, name: Region, device_type: str) -> Iterator[Cast]:
    """Compute a block in the dtype that the policy has for a region; the yielded function casts its inputs.

    float32 switches autocast off inside, a narrower dtype switches it on, a simulated one rounds. None changes nothing,
    and the function returns its argument. Around more than a few functions, test for None first: torch.compile gives up
    on a frame whose graph breaks inside a context manager.
    """
    dtype = policy.dtype_of(name)
    if dtype is None:
        yield _unchanged
        return
    if policy.simulate is not None:
        arithmetic = SimulatedArithmetic(dtype if policy.simulates(name) else None, policy.simulate)
        with torch.autocast(device_type, enabled=False), arithmetic:
            yield arithmetic.round
        return
    target: torch.dtype = getattr(torch, dtype)
    narrow = target != torch.float32
    with torch.autocast(device_type, dtype=target if narrow else None, enabled=narrow):
        yield lambda tensor: tensor.to(target)


def set_precision(root: nn.Module, policy: PrecisionPolicy) -> None:
    """Give every layer below `root` (and `root`) the policy."""
    for module in root.modules():
        if isinstance(getattr(module, "precision", None), PrecisionPolicy):
            module.precision = policy  # type: ignore[assignment]


@contextmanager
def use_precision(root: nn.Module, policy: PrecisionPolicy) -> Iterator[None]:
    """Compute a block under another policy, then put back what each layer had."""
    before = {
        module: module.precision
        for module in root.modules()
        if isinstance(getattr(module, "precision", None), PrecisionPolicy)
    }
    set_precision(root, policy)
    try:
        yield
    finally:
        for module, own in before.items():
            module.precision = own


def region_of_parameters(root: nn.Module) -> dict[str, Region]:
    """Return the region of every parameter and buffer below `root`, by name.

    A tensor belongs to the nearest module above it that names a `region`; where none does to the norms, if it is a
    norm's, else to the trunk.
    """
    regions: dict[str, Region] = {}

    def visit(module: nn.Module, path: str, above: Region) -> None:
        is_norm = above == "trunk" and isinstance(module, nn.LayerNorm | nn.RMSNorm)
        here: Region = "norms" if is_norm else getattr(module, "region", above)
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        regions.update({f"{path}{name}": here for name, _ in tensors})
        for name, child in module.named_children():
            visit(child, f"{path}{name}.", here)

    visit(root, "", "trunk")
    return regions


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
