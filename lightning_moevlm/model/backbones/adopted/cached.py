"""Continues texts with the cache of a model of transformers: keys and values, or states of linear attention.

Beginnings of one length make a group, and each group has a cache. So no padding stands within a text, and positions
are those that the model counts by itself. A token costs one pass over one position per group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_moevlm.model.backbones.past import Past

_OFFSET = "rope_deltas"
"""What vision-language models keep between passes: the position of the next token, less its place, of each text."""


class Group(NamedTuple):
    """Texts of one length.

    rows_G: int64, their places in the batch.
    cache: of transformers.
    offsets: of positions, (G, 1) for each module that keeps them.
    """

    rows_G: Tensor
    cache: Any
    offsets: Sequence[Tensor | None]


class CachedTexts(Past):
    """Texts so far.

    Args:
        groups: all of them.
        length_B: tokens of each text.
    """

    def __init__(self, groups: Sequence[Group], length_B: Tensor) -> None:
        super().__init__([])
        self.groups, self.length_B = tuple(groups), length_B

    def append(self, text_B: Tensor) -> None:
        """Count one more token of each text; the model's pass has added it to the caches."""
        assert self.length_B is not None
        self.length_B = self.length_B + 1

    def select(self, rows: Tensor) -> None:
        """Keep these texts, in this order; one may be kept several times."""
        assert self.length_B is not None
        kept: list[Group] = []
        for group in self.groups:
            # where each kept text stands in the group
            matches = rows.unsqueeze(1) == group.rows_G
            new_G, place_G = matches.nonzero(as_tuple=True)
            if len(new_G):
                group.cache.reorder_cache(place_G)
                offsets = [None if each is None else each[place_G] for each in group.offsets]
                kept.append(Group(new_G, group.cache, offsets))
        self.groups, self.length_B = tuple(kept), self.length_B[rows]


def split_by_length(length_B: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each length, and the rows that have it."""
    for length in length_B.unique().tolist():
        yield length, (length_B == length).nonzero().squeeze(1)


@contextmanager
def fresh_offsets(model: nn.Module) -> Iterator[list[Tensor | None]]:
    """Run a first pass; afterwards the list holds the offsets that each module has kept, one of each text."""
    found: list[Tensor | None] = []
    holders = _holders(model)
    for module in holders:
        setattr(module, _OFFSET, None)
    yield found
    for module in holders:
        found.append(getattr(module, _OFFSET))


def restore_offsets(model: nn.Module, offsets: Sequence[Tensor | None]) -> None:
    """Let the next pass continue texts with these offsets."""
    for module, offset in zip(_holders(model), offsets, strict=True):
        setattr(module, _OFFSET, offset)


def _holders(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _OFFSET in vars(module)]


def lay_out(parts: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> Tensor:
    """Return rows of several groups in the order of the batch, zeros after shorter ones.

    parts: of each group its rows (G,), and its values (G, S, D).
    shape: of the result, (B, S, D).
    """
    like = parts[0][1]
    whole = torch.zeros(shape, dtype=like.dtype, device=like.device)
    for rows_G, values in parts:
        whole[rows_G, : values.shape[1]] = values
    return whole
