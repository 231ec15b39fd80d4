"""A configuration as flat dotted keys, and what sets two of them apart.

`trainer.callbacks.0.init_args.every: 10` can be a parameter in MLflow, a row of a table and a line of a
difference.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple


class Change(NamedTuple):
    """The values of a key in the base and now, as `flat` spells them; None where the key is absent."""

    base: str | None
    now: str | None


def flat(tree: Mapping[str, object]) -> dict[str, str]:
    """Return {dotted key: value}: strings as they are, all else as JSON; listed mappings are numbered."""
    return {key: _spelled(value) for key, value in _leaves("", tree)}


def changes(base: Mapping[str, str], now: Mapping[str, str]) -> dict[str, Change]:
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


def _spelled(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
