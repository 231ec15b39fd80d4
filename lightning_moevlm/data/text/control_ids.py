"""Maps the ids of any tokenizer to ids that begin with [PAD], [MASK], [BOS] and [EOS].

Other tokenizers name these tokens otherwise, number them anywhere, or lack some. Each of the four gets its fixed id,
and all other ids follow in their order. The tokenizers of sets already begin with the four, and keep their ids.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from lightning_moevlm.contracts.special_tokens import SPECIAL_TOKENS

_EQUIVALENTS = {
    "[PAD]": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "[MASK]": ("[MASK]", "<mask>", "<|mask|>"),
    "[BOS]": ("[BOS]", "<s>", "<bos>", "<|startoftext|>", "<|begin_of_text|>", "<|bos|>", "[CLS]"),
    "[EOS]": ("[EOS]", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>", "[SEP]"),
}


class ControlIds(NamedTuple):
    """The numbering of a tokenizer's ids."""

    names: tuple[str | None, ...]  # of the four control tokens in the file, None where it has none
    to_model: dict[int, int] | None  # by id of the file, without its control tokens; None: ids stay
    to_file: tuple[int, ...]  # ids of the file by those of the model, from the first that is no control token
    vocab_size: int

    @property
    def lacking(self) -> list[str]:
        """The control tokens that the file does not have."""
        return [token for token, name in zip(SPECIAL_TOKENS, self.names, strict=True) if name is None]

    def describe(self) -> str:
        """Return which tokens of the file are the control tokens, as words."""
        said = [f"{token} is {name}" for token, name in zip(SPECIAL_TOKENS, self.names, strict=True) if name]
        said += [f"{', '.join(self.lacking)} {'is' if len(self.lacking) == 1 else 'are'} added"] if self.lacking else []
        return ", ".join(said)


def number_ids(tokenizer: Tokenizer) -> ControlIds:
    """Find a tokenizer's control tokens by their usual names, and number its ids.

    A token counts only if the file declares it as special, so that no text contains it.
    """
    special = {str(token.content): id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    names = tuple(_first(_EQUIVALENTS[token], special) for token in SPECIAL_TOKENS)
    found = [None if name is None else special[name] for name in names]
    ids = sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()))
    if found == list(range(len(SPECIAL_TOKENS))) and ids == list(range(len(ids))):
        return ControlIds(names, None, (), len(ids))
    others = tuple(id_ for id_ in ids if id_ not in found)
    to_model = {id_: index for index, id_ in enumerate(others, start=len(SPECIAL_TOKENS))}
    return ControlIds(names, to_model, others, len(SPECIAL_TOKENS) + len(others))


def _first(names: Sequence[str], special: dict[str, int]) -> str | None:
    return next((name for name in names if name in special), None)
