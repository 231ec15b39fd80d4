"""Reads the changes of an arm over the base: dotted or nested keys, flattened and merged into one config.

Keys that the study sets itself (seed, budget, logger, output folder) are refused: arms differ in the question only. A
key that ends in + adds items to a list, `trainer.callbacks+: [...]`; several factors may add to one list.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_moevlm.study.declare.yaml_nodes import YamlNode

# Key -> the field of the study file that sets it.
OWNED: dict[str, str] = {
    "seed_everything": "seeds",
    "data.seed": "seeds",
    "model.seed": "seeds",
    "trainer.max_steps": "budget.max_steps",
    "trainer.max_epochs": "budget.max_steps",
    "trainer.max_time": "budget.minutes",
    "trainer.logger": "the study itself (one MLflow run per arm and seed)",
    "trainer.default_root_dir": "the study itself (runs/sweeps/...)",
}
_CALLBACKS = "trainer.callbacks"
_MORE = "+"  # at the end of a key: adds items to its list


@dataclass(frozen=True)
class Change:
    """One value over the base."""

    key: str  # dotted
    node: YamlNode  # the value at its place in the file

    def overlaps(self, other: "Change") -> bool:
        """Whether both set the same value, or one a part of the other's; adding items to a list does not count."""
        if self.key == other.key and self.key.endswith(_MORE):
            return False
        return f"{self.key}.".startswith(f"{other.key}.") or f"{other.key}.".startswith(f"{self.key}.")


def read_changes(key: str, node: YamlNode) -> tuple[Change, ...]:
    """Return the changes of one key: nested mappings are flattened; lists, numbers, texts and {} are values.

    Raises:
        UserError: The study sets this key itself.
    """
    if node.is_filled_mapping:
        return tuple(change for name, child in node.items() for change in read_changes(f"{key}.{name}", child))
    for owned, by in OWNED.items():
        if key == owned or key.startswith(owned + "."):
            raise node.error(f"{key!r} may not differ between arms: it is set by {by}; remove it here")
    if key == _CALLBACKS:
        raise node.error(
            f"{key!r} would replace the callbacks that measure and guard every run; write {key}{_MORE} to add yours"
        )
    if key.endswith(_MORE):
        node.sequence()
    return (Change(key, node),)


def lay_over(below: Sequence[Change], above: Sequence[Change]) -> tuple[Change, ...]:
    """Return both, without changes of `below` whose key `above` sets too.

    Raises:
        UserError: One of `above` sets a key so that others set by `below` would be lost.
    """
    for mine in above:
        for theirs in below:
            high, low = _without_init_args(mine.key), _without_init_args(theirs.key)
            place = f"{theirs.node.file}:{theirs.node.line} sets {theirs.key!r}"
            if low.startswith(f"{high}."):
                raise mine.node.error(
                    f"{mine.key!r} would also undo what {place}; set the keys below it, e.g. {mine.key}.class_path"
                )
            if high.startswith(f"{low}.") and theirs.node.plain() not in (None, {}):
                raise mine.node.error(f"{mine.key!r} would undo what {place}; set {theirs.key}.class_path there")
    over = [f"{_without_init_args(change.key)}." for change in above if not change.key.endswith(_MORE)]
    kept = [change for change in below if not any(key.startswith(f"{_without_init_args(change.key)}.") for key in over)]
    return (*kept, *above)


def merge(changes: Iterable[Change]) -> dict[str, Any]:
    """Return changes as one nested config.

    Raises:
        UserError: Two of them set the same value, or one lies below a plain value of another.
    """
    config: dict[str, Any] = {}
    for change in changes:
        *path, last = change.key.split(".")
        if not all((*path, last)):
            raise change.node.error(f"{change.key!r} has an empty part; write keys like model.losses.router_z")
        here = config
        for part in path:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise change.node.error(f"{change.key!r} lies below a key that is already set to a plain value here")
        if last in here and last.endswith(_MORE):
            here[last] = [*here[last], *_items(change.node)]
            continue
        if last in here:
            raise change.node.error(f"{change.key!r} is set twice here (dotted and nested?)")
        here[last] = change.node.plain()
    return config


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return two nested configs as one: values of `above` win, and lists of `key+` are joined."""
    config = copy.deepcopy(dict(below))
    for key, value in above.items():
        before = config.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping) and value:
            config[key] = overlay(before, value)
        elif key.endswith(_MORE) and key in config:
            config[key] = [*config[key], *value]
        else:
            config[key] = copy.deepcopy(value)
    return config


def _without_init_args(key: str) -> str:
    return key.replace(".init_args", "")


def _items(node: YamlNode) -> list[Any]:
    return [child.plain() for child in node.sequence()]
