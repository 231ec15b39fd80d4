"""Initial weights that belong to a name, not to an order.

Each parameter is drawn from a generator seeded with (seed, its full name). Two models that share a parameter's name
and shape share its initial value, whatever else differs between them: arms of a study start from the same point.

Rule: matrices, stacks and embeddings are normal with the given std, cut at two std (truncated normal, as in BEiT and
Switch, arXiv 2101.03961 section 2.4); biases are 0; norm scales and single numbers are 1. Matrices of blocks follow the
block's scheme (init_scheme.py); a module with an `initial_std` or an `initial_value` has its own, and the `ExpertInit`
of an expert stack may ask for a scale per fan-in, or for experts that start alike.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from lightning_moevlm.experts import ExpertInit, ExpertStack
from lightning_moevlm.layers.init_scheme import InitialScale, initial_scales

_NORMS = (nn.LayerNorm, nn.RMSNorm)


def initialise(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Set every parameter of the model in place.

    Parameters without memory ("meta") and frozen ones are left alone; those of a module with `starts_frozen` are drawn.

    Args:
        model: parameters named as in `named_parameters`.
        seed: any integer.
        std: standard deviation of matrices before truncation.
    """
    modules = dict(model.named_modules())
    scales = initial_scales(model, std)
    for name, parameter in model.named_parameters():
        path, _, own_name = name.rpartition(".")
        owner = modules[path]
        if parameter.is_meta or not (parameter.requires_grad or getattr(owner, "starts_frozen", False)):
            continue  # no memory, or somebody's own frozen weights
        initial_value = getattr(owner, "initial_value", None)
        own_std = getattr(owner, "initial_std", None)
        if initial_value is not None:
            nn.init.constant_(parameter, initial_value)
        elif parameter.ndim == 0 or (isinstance(owner, _NORMS) and own_name == "weight"):
            nn.init.ones_(parameter)
        elif "bias" in own_name:
            nn.init.zeros_(parameter)
        else:
            scale = scales.get(name, InitialScale(std)) if own_std is None else InitialScale(own_std)
            init = owner.init if isinstance(owner, ExpertStack) else ExpertInit()
            if init.scale is not None:
                scale = InitialScale(math.sqrt(init.scale / parameter.shape[-2]))
            values = _drawn(parameter.shape, scale, seed_of(seed, name))
            if init.same:
                values = values[:1].expand_as(values)  # the first expert is the same in both kinds of arm
            with torch.no_grad():
                parameter.copy_(values)


def _drawn(shape: torch.Size, scale: InitialScale, seed: int) -> Tensor:
    values = torch.zeros(shape, dtype=torch.float32, device="cpu")
    if scale.std > 0:
        generator = torch.Generator("cpu").manual_seed(seed)
        bound = scale.cut * scale.std
        nn.init.trunc_normal_(values, std=scale.std, a=-bound, b=bound, generator=generator)
    if scale.value_factor != 1.0:
        values.view(3, -1)[2] *= scale.value_factor  # queries, keys, values
    return values


def seed_of(seed: int, *parts: str | int) -> int:
    """Return a 63-bit seed that depends on every part, the same on every machine and Python."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
