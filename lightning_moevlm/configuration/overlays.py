"""Merges mappings, such as `data.sources` and `model.backbone.config`, entry by entry across configuration files.

jsonargparse alone keeps only the last file's mapping, so an arm that sets one weight would silently lose the other
sources or losses, and one that sets a size of a model the others. Values that the parser reads only in files are moved
there from the command line, as are entries of mappings that take any key.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.yaml_text import read_yaml, write_yaml

_REFERENCE = re.compile(r"\$\{[\w.]+\}")
_JOINT = ("model", "objective", "init_args")
_FREE = (("model", "backbone", "init_args", "config"), ("data", "chat", "options"))
"""Mappings that take any key, which the parser cannot check."""
_NAMED = (
    ("data", "sources"),
    ("model", "losses", "others"),
    *((*_JOINT, name) for name in ("parts", "weights", "sources")),
    *_FREE,
)
_KINDS = ("class_path", "model_type")
"""Entries that say what the others are of."""


class NamesMerger:
    """Takes configuration files in order; after one that adds to such a mapping it writes a file with all entries.

    Args:
        folder: for the written files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, ...], dict[str, object]] = {path: {} for path in _NAMED}
        self._num_seen = 0

    def add_file(self, file: Path) -> list[Path]:
        """Return the next file, and the written ones that follow it."""
        self._num_seen += 1
        result = [file]
        content = read_yaml(file.read_text(encoding="utf-8"))
        for path in _NAMED:
            *outer, last = path
            group = content
            for part in outer:
                if isinstance(group, Mapping) and (part != "init_args" or part in group):  # it may be left out
                    group = group.get(part)
                if isinstance(group, Mapping) and "class_path" in group:
                    self._known[path] = {}  # a file that names the class gives all of its names
            if not isinstance(group, Mapping) or last not in group:
                continue
            named = group[last]
            if not isinstance(named, Mapping):
                self._known[path] = {}  # null removes all entries; the parser refuses other values
                continue
            known = self._known[path]
            merged = _over(known, named) if _continues(known, named) else dict(named)
            if merged != named:
                whole = self._folder / f"{'.'.join(path)}{self._num_seen}.yaml"
                whole.write_text(write_yaml(_nested(path, merged)), encoding="utf-8")
                result.append(whole)
            self._known[path] = merged
        return result

    def add_option(self, key: str, value: str) -> list[Path]:
        """Return files in place of an option that `sets_entry`.

        Raises:
            UserError: a value that is not valid YAML.
        """
        try:
            content = read_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{key}: {value} is not a valid value; check brackets and quotes") from error
        path = key.split(".")
        if path[:2] == ["model", "backbone"] and path[2] != "init_args":
            path.insert(2, "init_args")
        file = self._folder / f"option{self._num_seen}.yaml"
        file.write_text(write_yaml(_nested(path, content)), encoding="utf-8")
        return self.add_file(file)


def sets_entry(key: str) -> bool:
    """Return whether an option is a mapping that takes any key, or an entry of one."""
    plain = key.replace(".init_args", "")
    wholes = [".".join(path).replace(".init_args", "") for path in _FREE]
    return any(plain == whole or plain.startswith(f"{whole}.") for whole in wholes)


def _over(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        if isinstance(old, str) and isinstance(value, Mapping) and "init_args" in value:
            old = {"class_path": old}  # the short spelling of a class without options
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _continues(old, value):
            merged[name] = _over(old, value)
        else:
            merged[name] = value
    return merged


def _continues(below: Mapping[str, object], above: Mapping[str, object]) -> bool:
    """Return whether a value adds to the one before; options of another class or family do not."""
    kind = next((name for name in _KINDS if name in above), None)
    if kind is not None:
        return above[kind] == below.get(kind)
    return "class_path" not in below or "init_args" in above


def _nested(path: Sequence[str], value: object) -> object:
    for part in reversed(path):
        value = {part: value}
    return value


def move_values_to_files(words: Sequence[str], folder: Path) -> list[str]:
    """Replace `--model.losses null` and `--data.image_size '${...}'` by a file.

    For a group, jsonargparse looks for a file named null. It resolves references from the root of the configuration
    only in files.
    """
    result: list[str] = []
    position = 0
    while position < len(words):
        key, equals, value = words[position].partition("=")
        if not equals and key.startswith("--") and position + 1 < len(words):
            value = words[position + 1]
        is_group = key.startswith("--model.") and key.count(".") == 1
        is_whole = key.startswith("--") and (".init_args." in key or key.count(".") == 1)
        if (value == "null" and is_group) or (_REFERENCE.fullmatch(value) and is_whole):
            path = folder / f"value{position}.yaml"
            path.write_text(
                json.dumps(_nested(key.removeprefix("--").split("."), None if value == "null" else value)),
                encoding="utf-8",
            )
            result += ["-c", str(path)]
            position += 1 if equals else 2
        else:
            result.append(words[position])
            position += 1
    return result
