"""Lists what may be true of a token, and the null models that a claim about it must beat.

A router that looks at positions alone, or at identities alone, follows the content of images and texts by accident: the
first word is an article, and a ground is often white. Each label therefore names the null models of which the claim is
independent (`atlas/statistics/null_models.py` has them); the claim's p is the largest of theirs. Words and colours are
what tokens are by themselves: of them a router that looks at identities may well be said to be specialised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lightning_moevlm.contracts.routing_plan import Modality

MOST_VALUES = 4096
"""Of a label; what comes later counts as OTHER."""
OTHER = "(others)"
UNKNOWN = -1
"""The code of a token of which a label says nothing."""


class Null(StrEnum):
    """A null model: what may be exchanged if a claim is not true."""

    SAMPLES = "samples"
    """The samples: each keeps its labels, and gets the experts of another at the same positions."""
    SHIFTS = "shifts"
    """The positions of a sample: its experts are shifted along them, over the end to the beginning."""
    IDENTITIES = "identities"
    """Token ids and patch codes: each gets the experts of another one."""
    OBJECTS = "objects"
    """Objects by name: each gets the experts of another one."""
    POSITIONS = "positions"
    """Positions of the sequence: each gets the experts of another one."""


@dataclass(frozen=True)
class Label:
    """Something that may be true of a token."""

    name: str
    modality: Modality | None
    """Of the tokens that have it; None: of all."""
    title: str
    beyond: tuple[Null, ...]


def _of_both(name: str, title: str, image: tuple[Null, ...], text: tuple[Null, ...]) -> tuple[Label, Label]:
    return (
        Label(f"image/{name}", Modality.IMAGE, f"{title} of patches", image),
        Label(f"text/{name}", Modality.TEXT, f"{title} of words", text),
    )


_CONTENT = (Null.SAMPLES, Null.IDENTITIES)
_GROUPED = (Null.SAMPLES, Null.IDENTITIES, Null.OBJECTS)
LABELS: tuple[Label, ...] = (
    Label("modality", None, "Modality", (Null.IDENTITIES, Null.POSITIONS)),
    Label("image/position", Modality.IMAGE, "Position of patches", (Null.SHIFTS, Null.IDENTITIES)),
    Label("image/colour", Modality.IMAGE, "Colour of patches", (Null.SAMPLES,)),
    Label("text/position", Modality.TEXT, "Position of words", (Null.SHIFTS, Null.IDENTITIES)),
    Label("text/word", Modality.TEXT, "Word", (Null.SAMPLES,)),
    Label("text/word class", Modality.TEXT, "Word class", _CONTENT),
    *_of_both("object", "Object", _CONTENT, (Null.SAMPLES,)),
    *_of_both("category", "Category of the object", _GROUPED, _GROUPED),
    *_of_both("object colour", "Colour of the object", _GROUPED, _GROUPED),
    *_of_both("question kind", "Kind of the question", _CONTENT, _CONTENT),
    *_of_both("class", "Class of the sample", _CONTENT, _CONTENT),
)
BY_NAME = {label.name: label for label in LABELS}


class Values:
    """The values of a label in the order of their first token, each with its code."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def code(self, value: str) -> int:
        """Return the code of a value, from 0 on."""
        known = self._codes.get(value)
        if known is not None:
            return known
        if len(self._codes) >= MOST_VALUES:
            return self._codes[OTHER]
        value = OTHER if len(self._codes) == MOST_VALUES - 1 else value
        return self._codes.setdefault(value, len(self._codes))

    def codes(self, values: Sequence[str | None]) -> list[int]:
        """Return the codes of values, UNKNOWN for None."""
        return [UNKNOWN if value is None else self.code(value) for value in values]

    @property
    def names(self) -> tuple[str, ...]:
        """The values by their codes."""
        return tuple(self._codes)
