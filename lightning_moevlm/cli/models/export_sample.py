"""The conversations on which an exported model is compared with the trained one."""

import random
import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_moevlm.contracts.batch import JoinedChats

_SIZES = ((64, 96), (96, 64))  # pixels of images, height and width
_NUM_WORDS = 12


def draw_chats(resolved: Mapping[str, Any], sees: bool) -> "JoinedChats | None":
    """Return conversations of random words, with random images if the model sees them.

    None: the run made none of its samples, so that random token ids will do.

    Args:
        resolved: configuration of the run.
        sees: whether the model has a vision tower.

    Raises:
        UserError: the processor of `data.chat` cannot be loaded.
    """
    options = resolved["data"].get("chat")
    if options is None:
        return None
    import numpy as np
    from PIL import Image

    from lightning_moevlm.contracts.batch import join_chats
    from lightning_moevlm.data.text.chat import ChatMaker, ChatOptions, Turn

    maker = ChatMaker(ChatOptions(**options))
    words, pixels = random.Random(0), np.random.default_rng(0)
    chats = []
    for height, width in _SIZES:
        noise = pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)
        turn = Turn(*(" ".join(_draw_word(words) for _ in range(_NUM_WORDS)) for _ in Turn._fields))
        chats.append(maker.make([Image.fromarray(noise)] if sees else [], [turn])[0])
    return join_chats(chats)


def _draw_word(words: random.Random) -> str:
    return "".join(words.choices(string.ascii_lowercase, k=words.randint(1, 8)))
