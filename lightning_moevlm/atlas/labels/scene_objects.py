"""Finds the annotated objects of a sample in its patches and words.

Annotations are those of the set `scenes`, which a set of one's own may have too: the json member holds `objects`, a
list of {name, category, colour, boxes}, boxes in pixels of the stored image (left, top, right, bottom); and `ground`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

GROUND = "(ground)"
"""The object of patches without one."""
_LEAST_COVERED = 0.25  # of a patch


class SceneObject(msgspec.Struct, frozen=True):
    """One or several copies of a thing."""

    name: str
    category: str | None = None
    colour: str | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()


def read_objects(annotation: Mapping[str, Any]) -> tuple[SceneObject, ...]:
    """Return the objects of a json member; none if its `objects` are something else."""
    try:
        return msgspec.convert(annotation.get("objects", ()), tuple[SceneObject, ...])
    except msgspec.ValidationError:
        return ()


class ModelView(NamedTuple):
    """How a model sees an image: scaled to its shorter side, the middle of it, cut into square patches."""

    image_size: int
    grid: int
    """Patches of a side."""

    def cover(self, box: Sequence[float], stored: tuple[int, int]) -> NDArray[np.float64]:
        """Return the share of each patch that a box covers, (P,). stored: (width, height) of the image."""
        scale = self.image_size / min(stored)
        edges = np.linspace(0, self.image_size, self.grid + 1)
        shares = []
        for low, high, side in ((box[0], box[2], stored[0]), (box[1], box[3], stored[1])):
            offset = (side * scale - self.image_size) / 2
            start, stop = low * scale - offset, high * scale - offset
            shared = np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start)
            shares.append(np.clip(shared, 0, None) / (edges[1] - edges[0]))
        return np.outer(shares[1], shares[0]).ravel()


def objects_of_patches(objects: Sequence[SceneObject], view: ModelView, stored: tuple[int, int]) -> list[int | None]:
    """Return the number of the object that covers most of each patch; None where none covers a quarter of it."""
    if not objects:
        return [None] * view.grid**2
    covered = np.stack(
        [np.sum([view.cover(box, stored) for box in each.boxes] or [np.zeros(view.grid**2)], 0) for each in objects]
    )
    return [
        int(best) if covered[best, patch] >= _LEAST_COVERED else None
        for patch, best in enumerate(covered.argmax(axis=0))
    ]


def objects_of_words(objects: Sequence[SceneObject], words: Sequence[str]) -> list[int | None]:
    """Return the number of the object that each word names, in singular or plural; None for other words."""
    named: list[int | None] = [None] * len(words)
    longest_first = sorted(range(len(objects)), key=lambda number: -len(objects[number].name.split()))
    for number in longest_first:
        parts = objects[number].name.lower().split()
        for start in range(len(words) - len(parts) + 1):
            places = range(start, start + len(parts))
            is_free = all(named[place] is None for place in places)
            if is_free and all(_is_form(words[place], part) for place, part in zip(places, parts, strict=True)):
                for place in places:
                    named[place] = number
    return named


def _is_form(word: str, singular: str) -> bool:
    """Whether a word is a singular or its plural: stars, buses, leaves, cacti."""
    if word == singular:
        return True
    stem = singular[: max(3, len(singular) - 2)]
    return word.startswith(stem) and word[-1:] in ("s", "i") and abs(len(word) - len(singular)) <= 2
