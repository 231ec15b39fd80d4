"""Maps tokens to the words that they are parts of, and words to their classes."""

import re
import string
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from lightning_moevlm.contracts.special_tokens import EOS, SPECIAL_TOKENS
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer

_WORD = re.compile(r"\S+")


class Words(NamedTuple):
    """The words of a text, and the one that each token belongs to."""

    words: tuple[str, ...]
    """In lower case, without punctuation around them."""
    of_token: tuple[int | None, ...]
    """By position; None for control tokens and for what follows the text."""
    tokens: tuple[str, ...]
    """By position: the word, or the token itself where there is none."""


def find_words(text: str, ids: Sequence[int], tokenizer: CaptionTokenizer) -> Words:
    """Return the words of a text and of its tokens. ids: its row of a batch, without padding."""
    found = list(_WORD.finditer(text))
    words = tuple(_clean(each[0]) for each in found)
    of_character = {place: number for number, each in enumerate(found) for place in range(*each.span())}
    spans = tokenizer.spans(text)
    room = next((place for place, id_ in enumerate(ids[1:]) if id_ == EOS), len(ids) - 1)  # an answer may follow
    numbers: list[int | None] = []
    for position in range(len(ids)):
        place = position - 1
        start, stop = spans[place] if 0 <= place < min(room, len(spans)) else (0, 0)
        inside = [of_character[each] for each in range(start, stop) if each in of_character]
        numbers.append(inside[-1] if inside else None)
    shown = [
        SPECIAL_TOKENS[id_]
        if id_ < len(SPECIAL_TOKENS)
        else words[number]
        if number is not None
        else tokenizer.decode([id_]).strip()
        for id_, number in zip(ids, numbers, strict=True)
    ]
    return Words(words, tuple(numbers), tuple(shown))


class Tagger(NamedTuple):
    """Gives words their classes."""

    name: str
    tag: Callable[[Sequence[str]], list[str]]
    """Words of a text -> the universal class of each, such as NOUN."""


def find_tagger() -> Tagger | None:
    """Return the first pipeline of spaCy that is installed; None without one."""
    if find_spec("spacy") is None:
        return None
    import spacy

    names = sorted(spacy.util.get_installed_models())
    if not names:
        return None
    pipeline: Any = spacy.load(names[0], exclude=["ner", "parser"])

    def tag(words: Sequence[str]) -> list[str]:
        return [each.pos_ for each in pipeline(spacy.tokens.Doc(pipeline.vocab, words=list(words)))] if words else []

    return Tagger(f"spaCy {spacy.__version__}, {names[0]} {pipeline.meta['version']}", tag)


def _clean(word: str) -> str:
    return word.strip(string.punctuation).lower() or word
