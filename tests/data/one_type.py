"""Whether every field of a set's json members has one type, as readers that make tables of them need."""

from collections.abc import Iterable, Iterator


def types_by_field(annotations: Iterable[object]) -> dict[str, set[str]]:
    """Return the types of all values by their field (`objects[].boxes[][]`), over all samples; null is none."""
    found: dict[str, set[str]] = {}
    for annotation in annotations:
        for field, kind in _types("", annotation):
            found.setdefault(field, set()).add(kind)
    return found


def _types(field: str, value: object) -> Iterator[tuple[str, str]]:
    if value is not None:
        yield field, type(value).__name__
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _types(f"{field}.{name}", inner)
    if isinstance(value, list):
        for inner in value:
            yield from _types(f"{field}[]", inner)
