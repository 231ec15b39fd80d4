"""Continues conversations with an adopted model: each new token runs the whole sequence again, without a cache.

So it costs the square of the length. What it computes is what a forward pass computes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moevlm.contracts.batch import Chat
from lightning_moevlm.model.backbones.past import Past


class WholeChats(Past):
    """Conversations so far."""

    def __init__(self, chats: Sequence[Chat]) -> None:
        super().__init__([])
        self.chats = tuple(chats)
        device = chats[0].ids_S.device
        self.length_B = torch.tensor([len(chat.ids_S) for chat in chats], device=device)

    def append(self, text_B: Tensor) -> None:
        """Write one token after each conversation."""
        assert self.length_B is not None
        self.chats = tuple(chat.reply([id_]) for chat, id_ in zip(self.chats, text_B.tolist(), strict=True))
        self.length_B = self.length_B + 1

    def select(self, rows: Tensor) -> None:
        """Keep these conversations, in this order; one may be kept several times."""
        assert self.length_B is not None
        self.chats = tuple(self.chats[row] for row in rows.tolist())
        self.length_B = self.length_B[rows]
