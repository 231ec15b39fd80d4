"""By how much each expert changes in a step, so that one that does not learn is found.

    u_e = |change of the expert's weights|        recorded: u_e / median of the layer's experts

The first 32 numbers of each expert's slice of each stack are read. Optimisers that scale by moments move all experts
that have a gradient about alike, whatever their load; an expert without one stays behind.
"""

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_moevlm.model.layers import Mixture

_LENGTH = 32
KIND = "expert_update"


class ExpertUpdates:
    """Measures the experts of a module.

    Args:
        module: in place, on its device; stacks that are not trained are left out.
    """

    def __init__(self, module: nn.Module) -> None:
        names: list[str] = []
        self._slices: list[Tensor] = []  # (E, n) each
        rows: list[Tensor] = []
        for path, layer in module.named_modules():
            if not isinstance(layer, Mixture):
                continue
            stacks = [stack.detach() for stack in layer.experts.stacks() if stack.requires_grad]
            if not stacks:
                continue
            for stack in stacks:
                length = min(_LENGTH, stack[0].numel())
                self._slices.append(stack.as_strided((len(stack), length), (stack.stride(0), 1)))
                rows.append(torch.arange(len(stack)).repeat_interleave(length) + len(names))
            names += [f"{KIND}/{path}/expert{e}" for e in range(len(stacks[0]))]
        self.names = tuple(names)
        device = self._slices[0].device if self._slices else None
        self._row_N = torch.cat(rows).to(device) if rows else torch.zeros(0, dtype=torch.int64)
        self._before_N = self._read()

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Return by how much each expert has changed since the last call, fp32 (all experts)."""
        now_N = self._read()
        change_N, self._before_N = now_N - self._before_N, now_N
        return change_N.new_zeros(len(self.names)).index_add(0, self._row_N, change_N.square()).sqrt()

    def _read(self) -> Tensor:
        return torch.cat([each.flatten() for each in self._slices]).float() if self._slices else torch.zeros(0)


def divide_by_median(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values with the updates of experts as shares of their layer's median; without those of median 0."""
    layers = {name: name.rpartition("/")[0] for name in values if name.startswith(f"{KIND}/")}
    of_layer: dict[str, list[float]] = {}
    for name, layer in layers.items():
        of_layer.setdefault(layer, []).append(values[name])
    medians = {layer: statistics.median(found) for layer, found in of_layer.items()}
    divided = dict(values)
    for name, layer in layers.items():
        value = divided.pop(name)
        if medians[layer]:
            divided[name] = value / medians[layer]
    return divided
