"""A parser that writes references such as `${trainer.max_steps}` instead of their values.

A printed or recorded configuration can then be used with another budget, size or seed, and its references follow.
jsonargparse writes the whole configuration once, unresolved, and reads it back resolved; the references are noted then.
They are written if they still give the option's value. An option set by a later file or flag keeps that value.
"""

import ast
import json
import re
from argparse import Action
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_moevlm.common.yaml_text import read_yaml
from lightning_moevlm.configuration.parsers import dump_yaml

_RELATIVE = re.compile(r"\$\{(\.+)([^{}]*)\}")

Path = tuple[str, ...]


class References:
    """The references of one command line.

    Args:
        subcommand: key of the configuration in the parser of all subcommands.
    """

    def __init__(self, subcommand: str) -> None:
        self._subcommand = subcommand
        self._by_path: dict[Path, str] = {}

    def note(self, unresolved: Mapping[str, Any]) -> None:
        """Note every text with a reference; relative ones are made absolute."""
        tree = unresolved.get(self._subcommand, unresolved)
        self._by_path = {path: _absolute(text, path) for path, text in _texts(tree, ()) if "${" in text}

    def put_back(self, resolved: dict[str, Any]) -> bool:
        """Write references into a resolved configuration if they give its values; return whether any do."""
        here = {path: text for path, text in self._by_path.items() if _holder(resolved, path) is not None}
        whole = OmegaConf.create({**resolved, _KEY: list(here.values())})
        found = False
        for index, (path, text) in enumerate(here.items()):
            holder = _holder(resolved, path)
            assert holder is not None
            try:
                value = whole[_KEY][index]
            except OmegaConfBaseException:  # it refers to a key outside this part of the configuration
                continue
            if value == holder[path[-1]]:
                holder[path[-1]] = text
                found = True
        return found


_KEY = "the references themselves"


class ReferenceParser(LightningArgumentParser):
    """Writes configurations with their references.

    Args:
        args: as of LightningArgumentParser.
        references: of the command line; None writes resolved values, as in jsonargparse's internal parsers.
        kwargs: as of LightningArgumentParser.
    """

    def __init__(self, *args: Any, references: References | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._references = references

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse words.

        jsonargparse reads the value of an option within a part, and gives it to the part's own parser as Python writes
        it. YAML would read None as a word, so that null could not be given there.
        """
        if self._references is None and isinstance(args, list) and len(args) == 1:
            args = [_as_yaml(args[0])]
        return super().parse_args(args, *rest, **kwargs)

    def _check_value_key(
        self, action: Action, value: Any, key: str, cfg: Namespace | None, append: bool = False
    ) -> Any:
        """Accept references unchecked, so that a changed class_path keeps the options that both classes have.

        jsonargparse checks options before references are resolved, and would drop `image_size: ${data.image_size}` as
        not a number. Once resolved, every value is checked.
        """
        if isinstance(value, str) and value.startswith("${"):
            return value
        return super()._check_value_key(action, value, key, cfg, append)

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Return the configuration as YAML."""
        text: str = super().dump(*args, **kwargs)
        if self._references is None or kwargs.get("with_comments"):
            return text
        tree = read_yaml(text)
        if "${" in text:
            self._references.note(tree)
        elif isinstance(tree, dict) and self._references.put_back(tree):
            return dump_yaml(tree)
        return text


def _as_yaml(word: str) -> str:
    """Return `--key=value` with a value that Python has written, such as None or {'a': None}, as YAML."""
    key, equals, value = word.partition("=")
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError):
        return word
    return f"{key}{equals}{json.dumps(read)}" if read is None or isinstance(read, dict | list) else word


def _texts(node: object, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _texts(value, (*path, str(name)))
    elif isinstance(node, str):
        yield path, node


def _absolute(text: str, path: Path) -> str:
    def whole(found: re.Match[str]) -> str:
        above = path[: -len(found[1])]  # one dot is the group that the option is in
        return f"${{{'.'.join((*above, found[2]))}}}"

    return _RELATIVE.sub(whole, text)


def _holder(tree: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the mapping that holds the last name of a path."""
    here: Any = tree
    for name in path[:-1]:
        here = here.get(name) if isinstance(here, dict) else None
    return here if isinstance(here, dict) and path[-1] in here else None
