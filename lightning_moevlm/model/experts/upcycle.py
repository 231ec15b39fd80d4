"""Makes experts of a dense feed-forward.

    copies    every expert starts as the feed-forward, and routers start anew (sparse upcycling, arXiv 2212.05055,
              section 3)
    noise     normal numbers are added to each copy
    anew      in each expert a share of the hidden units, drawn for it alone, starts from normal numbers of the mean and
              standard deviation of the units that they replace (Drop-Upcycling, arXiv 2502.19261, section 3.2)
    slices    G slices of F / G hidden units stand for each copy: expert e = n G + s is slice s of copy n (virtual
              groups, arXiv 2410.07524). A token that gets all slices of a copy gets the copy

Biases are copied.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.model.initial_weights import derive_seed


@dataclass(frozen=True)
class Upcycle:
    """How experts start from a dense feed-forward.

    Args:
        noise: standard deviation of what is added to each expert, over that of the dense matrix; 0 leaves copies alike
            until routing tells them apart.
        reinitialised: share of each expert's hidden units that start anew (Drop-Upcycling uses 0.5).
        seed: of both.

    Raises:
        UserError: a number out of range.
    """

    noise: float = 0.0
    reinitialised: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        check_number("upcycle.noise", self.noise, least=0, most=1, advice="; at 1 it is as large as the dense matrix")
        check_number("upcycle.reinitialised", self.reinitialised, least=0, most=1)


def make_experts(
    matrix: Tensor,
    num_experts: int,
    hidden_axis: int,
    options: Upcycle,
    layer: str,
    stack: str,
    num_slices: int = 1,
) -> Tensor:
    """Return the stack of experts that starts from a dense matrix, fp32 (E, in, out).

    Stacks of one layer draw the same units.

    Args:
        matrix: (in, out).
        num_experts: E, a multiple of the slices.
        hidden_axis: of the matrix, 0 or 1.
        options: noise and new units.
        layer: its name, which seeds what is drawn.
        stack: name of the stack in the layer, likewise.
        num_slices: G.
    """
    matrix = matrix.float()
    slices = torch.stack(matrix.chunk(num_slices, dim=hidden_axis))
    experts = slices.repeat(num_experts // num_slices, 1, 1)
    name = f"{layer}.{stack}"
    if options.noise:
        generator = torch.Generator("cpu").manual_seed(derive_seed(options.seed, "noise", name))
        drawn = torch.randn(experts.shape, generator=generator, device="cpu")
        experts += options.noise * matrix.std() * drawn.to(experts.device)
    num_units = experts.shape[hidden_axis + 1]
    num_new = round(options.reinitialised * num_units)
    if num_new:
        for index, expert in enumerate(experts):
            units = _draw_units(options.seed, layer, index, num_units, num_new).to(expert.device)
            values = torch.Generator("cpu").manual_seed(derive_seed(options.seed, "values", name, index))
            replaced = expert.index_select(hidden_axis, units)
            drawn = torch.randn(replaced.shape, generator=values, device="cpu").to(expert.device)
            expert.index_copy_(hidden_axis, units, replaced.mean() + replaced.std() * drawn)
    return experts


def make_biases(bias: Tensor, num_experts: int, is_hidden: bool, num_slices: int = 1) -> Tensor:
    """Return the biases of experts that start from a dense bias, fp32 (E, 1, out).

    Args:
        bias: (out).
        num_experts: E, a multiple of the slices.
        is_hidden: whether it belongs to the hidden units, each slice of which has its own; the bias behind the last
            matrix is divided among the slices.
        num_slices: G.
    """
    slices = bias.float().chunk(num_slices) if is_hidden else (bias.float() / num_slices,) * num_slices
    return torch.stack(slices).repeat(num_experts // num_slices, 1).unsqueeze(1)


def _draw_units(seed: int, layer: str, expert: int, num_units: int, num_drawn: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "units", layer, expert))
    return torch.randperm(num_units, generator=generator, device="cpu")[:num_drawn]
