"""The key-value cache of generation: keys, values, layout and lengths of a batch's earlier positions."""

import torch
from torch import Tensor

from lightning_moevlm.contracts.sequence_layout import Layout
from lightning_moevlm.model.layers import KeyValues


class Past:
    """What the next positions of a batch of texts need of those before.

    key_values: of every block. layout: of the whole sequence so far. length_B: tokens of each text so far; one that
    began shorter than others has padding in the middle, which is masked.
    """

    def __init__(self, key_values: list[KeyValues]) -> None:
        self.key_values = key_values
        self.layout: Layout | None = None
        self.length_B: Tensor | None = None

    def append(self, text_B: Tensor) -> None:
        """Add one real token to each text."""
        assert self.layout is not None and self.length_B is not None
        spans, valid_BS, identity_BS = self.layout[:3]
        valid_BS = torch.cat([valid_BS, torch.ones_like(valid_BS[:, :1])], dim=1)
        if identity_BS is not None:
            identity_BS = torch.cat([identity_BS, text_B.unsqueeze(1)], dim=1)
        spans = (*spans[:-1], spans[-1]._replace(stop=spans[-1].stop + 1))
        self.layout = self.layout._replace(spans=spans, valid_BS=valid_BS, identity_BS=identity_BS)
        self.length_B = self.length_B + 1

    def select(self, rows: Tensor) -> None:
        """Keep these texts, in this order; one may be kept several times."""
        assert self.layout is not None and self.length_B is not None
        identity_BS = self.layout.identity_BS
        self.layout = self.layout._replace(
            valid_BS=self.layout.valid_BS[rows], identity_BS=None if identity_BS is None else identity_BS[rows]
        )
        self.length_B = self.length_B[rows]
        for each in self.key_values:
            each.select(rows)
