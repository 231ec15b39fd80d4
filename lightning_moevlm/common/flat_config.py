"""Flattens a configuration into dotted keys, and finds the differences of two.

`trainer.callbacks.0.init_args.every: 10` can be a parameter in MLflow, a row of a table and a line of a difference.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class Change(NamedTuple):
    """A key's values in the base and now, as `flatten` writes them; None where the key is absent."""

    base: str | None
    now: str | None


def flatten(tree: Mapping[str, object]) -> dict[str, str]:
    """Return {dotted key: value}: JSON, but for texts that do not read as JSON; listed mappings are numbered."""
    return {key: _to_text(value) for key, value in _leaves("", tree)}


def flatten_values(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} with values as they are; lists and empty mappings stay values."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        is_inner = isinstance(value, Mapping) and value
        leaves.update(flatten_values(value, f"{name}.") if is_inner else {name: value})
    return leaves


def unflatten(leaves: Mapping[str, str]) -> dict[str, Any]:
    """Return the tree of `flatten`; values that read as JSON (`32`, `null`) come back as such."""
    tree: dict[str, Any] = {}
    for key, text in leaves.items():
        here = tree
        *path, last = key.split(".")
        for part in path:
            inner = here.setdefault(part, {})
            if not isinstance(inner, dict):  # a name with a dot in it
                here, last = tree, key
                break
            here = inner
        here[last] = _read(text)
    return {key: _with_lists(value) for key, value in tree.items()}


def find_changes(base: Mapping[str, str], now: Mapping[str, str]) -> dict[str, Change]:
    """Return the keys that differ between two flat configurations, in order of their names."""
    keys = sorted(base.keys() | now.keys())
    return {key: Change(base.get(key), now.get(key)) for key in keys if base.get(key) != now.get(key)}


def _leaves(prefix: str, value: object) -> list[tuple[str, object]]:
    inner: Mapping[str, object] | None = None
    if isinstance(value, Mapping) and value:
        inner = {str(key): item for key, item in value.items()}
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        inner = {str(index): item for index, item in enumerate(value)}
    if inner is None:
        return [(prefix, value)]
    return [leaf for key, item in inner.items() for leaf in _leaves(f"{prefix}.{key}" if prefix else key, item)]


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _with_lists(value: Any) -> Any:
    """Return the value with lists for mappings whose keys are 0, 1, 2 ..."""
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(item) for key, item in value.items()}
    numbers = [str(number) for number in range(len(inner))]
    return [inner[number] for number in numbers] if inner and inner.keys() == set(numbers) else inner


def _to_text(value: object) -> str:
    is_plain = isinstance(value, str) and _read(value) is value
    return str(value) if is_plain else json.dumps(value, default=str, ensure_ascii=False)
