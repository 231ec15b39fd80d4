"""Weight decay is for matrices: norms, biases, embeddings, positions and routers are left out.

Decaying a router shrinks its logits and so acts as a hidden router z-loss; an ablation of stabilisers must not
contain one by accident.
"""

from collections.abc import Iterable
from typing import NotRequired, TypedDict

from torch import nn

_UNDECAYED = ("router", "token", "position", "mask", "modality")


class ParameterGroup(TypedDict):
    """An optimiser's parameter group; without `weight_decay` the optimiser's own default holds."""

    params: list[nn.Parameter]
    weight_decay: NotRequired[float]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[ParameterGroup]:
    """Split trainable parameters into decayed and undecayed ones; an empty group is left out."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or any(part.startswith(_UNDECAYED) for part in name.split("."))
        (undecayed if exempt else decayed).append(parameter)
    groups: list[ParameterGroup] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
