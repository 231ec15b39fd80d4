"""Initial weights that belong to a name, not to an order.

Each parameter is drawn from a generator seeded with (seed, its full name). Two models that share a parameter's name
and shape share its initial value, whatever else differs between them: arms of a study start from the same point.

Rule: matrices, stacks and embeddings are normal with the given std, cut at two std (truncated normal, as in BEiT and
Switch, arXiv 2101.03961 section 2.4); biases are 0; norm scales and single numbers are 1. A module with an
`initial_std` has its own.
"""

import hashlib

import torch
from torch import nn

_NORMS = (nn.LayerNorm, nn.RMSNorm)


def initialise(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Set every parameter of the model in place; frozen ones and those without memory ("meta") are left alone.

    Args:
        model: parameters named as in `named_parameters`.
        seed: any integer.
        std: standard deviation of matrices before truncation.
    """
    norm_scales = {
        f"{name}.weight" if name else "weight" for name, module in model.named_modules() if isinstance(module, _NORMS)
    }
    own_std = {
        name: module.initial_std
        for name, module in model.named_modules()
        if getattr(module, "initial_std", None) is not None
    }
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.requires_grad:
            continue  # no memory, or somebody's own frozen weights
        if name in norm_scales or parameter.ndim == 0:
            nn.init.ones_(parameter)
        elif "bias" in name.rsplit(".", 1)[-1]:
            nn.init.zeros_(parameter)
        else:
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            generator = torch.Generator("cpu").manual_seed(seed_of(seed, name))
            scale = own_std.get(name.rpartition(".")[0], std)
            if scale == 0:
                values.zero_()
            else:
                nn.init.trunc_normal_(values, std=scale, a=-2 * scale, b=2 * scale, generator=generator)
            with torch.no_grad():
                parameter.copy_(values)


def seed_of(seed: int, *parts: str | int) -> int:
    """Return a 63-bit seed that depends on every part, the same on every machine and Python."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
