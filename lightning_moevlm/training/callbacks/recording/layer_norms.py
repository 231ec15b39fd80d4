"""Norms of gradients and updates, by layer.

Gradients were measured before clipping, one norm per parameter. Copying all parameters to measure an update would cost
more than the rest of the recorder, so the update is measured on a part of the weights: 8 evenly spaced runs of 32 of
each parameter, because reading single weights would load a line of memory for each.

    norm^2 ~ sum over parameters of (size / number of weights read) x sum of their squared changes

It is exact for parameters of at most 256 numbers. The change is that since the step before, with those by actions.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_moevlm.training.optim import GradientNorms

_RUNS, _LENGTH = 8, 32
_READ = _RUNS * _LENGTH
"""Weights of a parameter that are read; all of a smaller one."""


class LayerNorms:
    """Measures the layers of a module.

    Args:
        module: in place, on its device; parameters that are not trained are left out.
    """

    def __init__(self, module: nn.Module) -> None:
        params = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        modules = dict(module.named_modules())
        layers = [layer_of(name, modules) for name, _ in params]
        self.layers = tuple(dict.fromkeys(layers))
        place = {layer: number for number, layer in enumerate(self.layers)}
        self._layer_of = {p: place[layer] for (_, p), layer in zip(params, layers, strict=True)}
        self._indices: dict[tuple[int, ...], Tensor] = {}  # layers of the parameters that have a gradient
        self.gradient_names = tuple(f"gradient_norm/{layer}" for layer in self.layers)
        self.update_names = tuple(f"update_norm/{layer}" for layer in self.layers)
        params.sort(key=lambda entry: entry[1].numel() > _READ)
        whole = [p.detach() for _, p in params if p.numel() <= _READ]
        large = [p.detach() for _, p in params if p.numel() > _READ]
        self._whole = [p.as_strided((p.numel(),), (1,)) for p in whole]  # in the order of memory
        self._runs = [p.as_strided((_RUNS, _LENGTH), (p.numel() // _RUNS, 1)) for p in large]
        device = params[0][1].device
        sizes = torch.tensor([min(p.numel(), _READ) for _, p in params], device=device)
        factors = torch.tensor([max(1.0, p.numel() / _READ) for _, p in params], device=device)
        layer_P = torch.tensor([self._layer_of[p] for _, p in params], device=device)
        self._factor_N = torch.repeat_interleave(factors, sizes)
        self._layer_N = torch.repeat_interleave(layer_P, sizes)
        self._before_N = self._read()

    @torch.no_grad()
    def update_norms(self) -> Tensor:
        """Return by how much each layer has changed since the last call, fp32 (layers)."""
        now_N = self._read()
        change_N, self._before_N = now_N - self._before_N, now_N
        return self._sum(self._layer_N, change_N.square() * self._factor_N).sqrt()

    def _read(self) -> Tensor:
        pieces = [torch.cat(self._whole)] if self._whole else []
        if self._runs:
            pieces.append(torch.cat(self._runs).flatten())
        return torch.cat(pieces).float()

    @torch.no_grad()
    def gradient_norms(self, measured: GradientNorms) -> Tensor:
        """Return the norm of the gradient of each layer, fp32 (layers); 0 without one."""
        which = tuple(map(id, measured.params))
        if which not in self._indices:
            places = [self._layer_of[p] for p in measured.params]
            self._indices[which] = torch.tensor(places, dtype=torch.int64, device=measured.norm_P.device)
        return self._sum(self._indices[which], measured.norm_P.float().square()).sqrt()

    def _sum(self, index: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.layers)).index_add(0, index, values)


def layer_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the layer that a parameter belongs to: the module that holds it, or that holds this building block.

    Linear maps, norms and containers of torch are building blocks, unless a layer of two words would become one.

    Args:
        name: of the parameter, such as backbone.blocks.0.attention.out.weight.
        modules: all modules by name.
    """
    path = name.rpartition(".")[0]
    while path.count(".") > 1 and type(modules[path]).__module__.startswith("torch."):
        path = path.rpartition(".")[0]
    return path or name
