"""Reads YAML with places, so that an error names file, line, key and the nearest valid name.

`compose_yaml(file)` composes the node tree of a YAML file (plain data only: no tags, no objects); `YamlNode` walks it.
Every error is one line: `ablations/x.yaml:12: arms.no_z: ...`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.nearest_name import suggest


class _StudyLoader(yaml.SafeLoader):
    """YAML's safe loader, but `1e-3` is a number, as it is for every other config file here."""


# PyYAML follows YAML 1.1, where a float needs a dot; the command line's parser reads 1e-3 as a float too.
_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+")
_StudyLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))

_INDENTATION = "; this line or one before it is indented unevenly: keys of one mapping begin in the same column"


@dataclass(frozen=True)
class YamlNode:
    """A YAML node with its place."""

    file: Path
    key: str  # dotted, "" for the whole document
    node: yaml.Node
    line: int  # line of its key, else of itself, from 1

    def error(self, message: str) -> UserError:
        """Return (to be raised) the one-line refusal of this node."""
        place = f"{self.file}:{self.line}: "
        return UserError(place + (f"{self.key}: " if self.key else "") + message)

    @property
    def is_null(self) -> bool:
        """Whether the value is empty or `null`."""
        return self.node.tag == "tag:yaml.org,2002:null"

    @property
    def is_filled_mapping(self) -> bool:
        """Whether the value is a mapping with at least one key."""
        return isinstance(self.node, yaml.MappingNode) and bool(self.node.value)

    def plain(self) -> Any:
        """Return the value as plain Python data.

        Raises:
            UserError: on tags that would build an object, and on what YAML cannot construct.
        """
        loader = _StudyLoader("")
        try:
            return loader.construct_document(self.node)
        except yaml.YAMLError as error:
            raise self.error(_one_line(error)) from error
        finally:
            loader.dispose()

    def items(self) -> list[tuple[str, "YamlNode"]]:
        """Return the children of a mapping in file order.

        Raises:
            UserError: This is not a mapping, a key is not a text, or a key occurs twice.
        """
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error(f"expected a mapping (`key: value` lines), got {self.describe()}")
        children: dict[str, YamlNode] = {}
        for key_node, value_node in self.node.value:
            line = key_node.start_mark.line + 1
            at_key = YamlNode(self.file, self.key, key_node, line)
            if not isinstance(key_node, yaml.ScalarNode):
                raise at_key.error("a key must be plain text")
            name = key_node.value
            if name in children:
                raise at_key.error(f"the key {name!r} occurs twice (first in line {children[name].line})")
            dotted = f"{self.key}.{name}" if self.key else name
            children[name] = YamlNode(self.file, dotted, value_node, line)
        return list(children.items())

    def child(self, name: str) -> "YamlNode":
        """Return the child of a mapping that has it."""
        return dict(self.items())[name]

    def fields(self, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, "YamlNode"]:
        """Return the children of a mapping whose keys are known in advance.

        Raises:
            UserError: on an unknown key (with the nearest valid one) and on a missing required key.
        """
        allowed = required + optional
        children = dict(self.items())
        for name, child in children.items():
            if name not in allowed:
                hint = suggest(name, allowed)
                if not self.key and "." in name:
                    hint = "values of a configuration stand in an arm, in a level of a factor or in a file of `base`; "
                raise child.error(f"unknown key {name!r}; {hint}allowed here: {', '.join(allowed)}")
        for name in required:
            if name not in children:
                where = "" if self.key else "; `moevlm describe study` explains them"
                raise self.error(f"the key {name!r} is missing; needed here: {', '.join(required)}{where}")
        return children

    def sequence(self, example: str = "") -> list["YamlNode"]:
        """Return the children of a non-empty list. example: a valid list, for the error."""
        if not isinstance(self.node, yaml.SequenceNode) or not self.node.value:
            hint = f"; write {self.key.rpartition('.')[2]}: {example}" if example else ""
            raise self.error(f"expected a list with at least one entry, got {self.describe()}{hint}")
        return [
            YamlNode(self.file, f"{self.key}[{i}]", child, child.start_mark.line + 1)
            for i, child in enumerate(self.node.value)
        ]

    def text(self) -> str:
        """Return a non-empty text, line breaks folded to spaces."""
        value = self.plain()
        if isinstance(value, bool | int | float):
            raise self.error(f"expected a text, got {self.describe()}, which YAML reads as {value!r}; put it in quotes")
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"expected a text, got {self.describe()}")
        return " ".join(value.split())

    def raw_text(self) -> str:
        """Return a value as it stands in the file, before YAML types it; empty for a mapping or a list."""
        return self.node.value if isinstance(self.node, yaml.ScalarNode) else ""

    def choice(self, allowed: tuple[str, ...]) -> str:
        """Return one of the allowed words."""
        value = self.plain()
        if value not in allowed:
            raise self.error(f"got {self.describe()}; {suggest(str(value), allowed)}allowed: {', '.join(allowed)}")
        return str(value)

    def describe(self) -> str:
        """Return the value in a few words, as it stands in the file."""
        if isinstance(self.node, yaml.MappingNode):
            return "a mapping"
        if isinstance(self.node, yaml.SequenceNode):
            return "a list" if self.node.value else "an empty list"
        return "nothing" if self.is_null else repr(self.node.value)


def compose_yaml(file: Path) -> YamlNode:
    """Return the root of a YAML file.

    Raises:
        UserError: The file is missing, unreadable, empty or not valid YAML (with the line).
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give the path of a YAML file") from error
    node = compose_text(text, file)
    if node is None:
        raise UserError(f"{file}: the file is empty; `moevlm sweep new FILE` writes one to start from")
    return node


def compose_text(text: str, file: Path) -> YamlNode | None:
    """Return the root of a YAML text; None for an empty one. file: its place, for errors.

    Raises:
        UserError: The text is not valid YAML (with the line).
    """
    try:
        node = yaml.compose(text, Loader=_StudyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = error.problem or error.context or ""
        advice = _INDENTATION if problem.startswith("expected <block end>") else ""
        raise UserError(f"{file}:{line}: not valid YAML: {problem}{advice}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {_one_line(error)}") from error
    return None if node is None else YamlNode(file, "", node, node.start_mark.line + 1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
