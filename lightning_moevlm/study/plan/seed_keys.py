"""Where a seed stands in a resolved config, so that one config gives those of every seed.

Resolving is slow (half a second), and seeds differ by one number. So an arm is resolved once with a mark in the seed's
place, a number that nobody writes; wherever the mark comes out, the seed belongs.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

MARK = 1_618_033_988
"""Stands for the seed: whole, positive, below 2**31."""
_PLAIN = re.compile(r"\$\{(?:[\w.]+|oc\.[^${}]*)\}")

Key = tuple[str, ...]


def follow_plainly(texts: Iterable[str]) -> bool:
    """Return whether configs, as written, can use a seed only as it is or as part of a text, never compute with it.

    References (`${data.seed}`) and OmegaConf's own resolvers are plain; references within references and resolvers of
    others are not, nor is a text that holds the mark itself.
    """
    return all("${" not in _PLAIN.sub("", text) and str(MARK) not in text for text in texts)


def marked_keys(config: Mapping[str, Any]) -> frozenset[Key] | None:
    """Return the keys that hold the mark; None where it is part of a text, of a list or of another type than int."""
    keys: set[Key] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            below = marked_keys(value)
            if below is None:
                return None
            keys |= {(str(name), *key) for key in below}
        elif type(value) is int and value == MARK:
            keys.add((str(name),))
        elif str(MARK) in str(value):
            return None
    return frozenset(keys)


def with_seed(config: Mapping[str, Any], keys: Iterable[Key], seed: int) -> dict[str, Any]:
    """Return a copy of the config with the seed at the keys."""
    result = copy.deepcopy(dict(config))
    for *path, last in keys:
        place = result
        for part in path:
            place = place[part]
        place[last] = seed
    return result
