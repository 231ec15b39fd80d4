"""Continues texts with an adopted model: each new token runs the whole sequence again, without a cache.

So it costs the square of the length. What it computes is what a forward pass computes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moevlm.contracts.batch import Chat
from lightning_moevlm.contracts.special_tokens import PAD
from lightning_moevlm.model.backbones.past import Past


class WholeTexts(Past):
    """Images and texts so far.

    Args:
        images_BRYX: uint8; None for texts alone.
        text_BL: int64 token ids.
        text_mask_BL: True on real tokens, which come first.
    """

    def __init__(self, images_BRYX: Tensor | None, text_BL: Tensor, text_mask_BL: Tensor) -> None:
        super().__init__([])
        self.images_BRYX, self.text_BL, self.text_mask_BL = images_BRYX, text_BL, text_mask_BL
        self.length_B = text_mask_BL.sum(dim=1)

    def append(self, text_B: Tensor) -> None:
        """Write one real token after each text."""
        assert self.length_B is not None
        if int(self.length_B.max()) == self.text_BL.shape[1]:
            column_B1 = torch.zeros_like(self.text_BL[:, :1])
            self.text_BL = torch.cat([self.text_BL, column_B1 + PAD], dim=1)
            self.text_mask_BL = torch.cat([self.text_mask_BL, column_B1.bool()], dim=1)
        place_B1 = self.length_B.unsqueeze(1)
        self.text_BL = self.text_BL.scatter(1, place_B1, text_B.unsqueeze(1))
        self.text_mask_BL = self.text_mask_BL.scatter(1, place_B1, True)
        self.length_B = self.length_B + 1

    def select(self, rows: Tensor) -> None:
        """Keep these texts, in this order; one may be kept several times."""
        assert self.length_B is not None
        self.text_BL, self.text_mask_BL = self.text_BL[rows], self.text_mask_BL[rows]
        self.images_BRYX = None if self.images_BRYX is None else self.images_BRYX[rows]
        self.length_B = self.length_B[rows]


class WholeChats(Past):
    """Conversations so far; see `WholeTexts`."""

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
