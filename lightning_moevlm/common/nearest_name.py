"""Finds the known name that a mistyped one most resembles."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def find_nearest(name: str, names: Sequence[str]) -> str | None:
    """Return the name that begins with or contains the one given, or is spelled like it; else None."""
    lower = name.lower()
    holding = [each for each in names if len(lower) > 2 and lower in each.lower()]
    if holding:
        return min(holding, key=lambda each: (not each.lower().startswith(lower), len(each)))
    by_lower = {each.lower(): each for each in names}
    near = get_close_matches(lower, by_lower, n=1)
    return by_lower[near[0]] if near else None


def suggest(name: str, names: Iterable[str]) -> str:
    """Return `did you mean 'x'? ` for the nearest name, or an empty text where none is near."""
    near = find_nearest(name, list(names))
    return f"did you mean {near!r}? " if near is not None else ""
