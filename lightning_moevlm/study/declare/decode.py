"""Decodes a YAML node into a typed record, or refuses it with file, line, key, what is allowed and the nearest name.

A record is a frozen `msgspec.Struct`; `doc` annotates each field with its meaning and an example. `moevlm describe
study` and `moevlm sweep new` print the same annotations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from lightning_moevlm.study.declare.yaml_nodes import YamlNode

Decoded = TypeVar("Decoded", bound="Record")


class Record(msgspec.Struct, frozen=True):
    """A mapping of a study file. Its docstring is one sentence for people."""


@dataclass(frozen=True)
class KeyRow:
    """One key for people."""

    key: str  # dotted, with NAME for a name of the author's choice
    type: str  # allowed values
    default: str  # "required" if there is none
    meaning: str  # one sentence, with the unit
    example: str  # YAML, as it stands after the colon


def doc(meaning: str, example: str, allowed: str = "", default: str = "") -> msgspec.Meta:
    """Return the annotation of a field: words as in `KeyRow`, by default those of its type and its default."""
    return msgspec.Meta(description=meaning, examples=[example], extra={"allowed": allowed, "default": default})


def kind(allowed: str, read: Callable[[YamlNode], object] | None = None, **bounds: float) -> msgspec.Meta:
    """Return the annotation of a type: its values in words, and how it is read or its bounds (`ge`, `gt`, `lt`)."""
    return msgspec.Meta(extra={"allowed": allowed, "read": read}, **bounds)  # type: ignore[call-overload]


Whole = Annotated[int, kind("whole number >= 1", ge=1)]
Positive = Annotated[float, kind("number > 0", gt=0)]


def decode(node: YamlNode, record: type[Decoded]) -> Decoded:
    """Return a mapping as a record.

    Raises:
        UserError: A key is unknown or missing, or a value is not allowed.
    """
    types = get_type_hints(record, include_extras=True)
    required = tuple(field.name for field in msgspec.structs.fields(record) if field.required)
    children = node.fields(required, tuple(name for name in record.__struct_fields__ if name not in required))
    return record(**{name: decode_value(child, types[name]) for name, child in children.items()})


def decode_value(node: YamlNode, type_: Any) -> Any:
    """Return a node as a value of a type: a record, a tuple of values, a word, a text, a number, or as it is.

    Raises:
        UserError: The value is not allowed.
    """
    base, *metas = get_args(type_) if get_origin(type_) is Annotated else (type_,)
    options = get_args(base)
    if (read := _find_extra(metas, "read")) is not None:
        return read(node)
    if base is YamlNode or YamlNode in options:
        return node
    if type(None) in options:
        return None if node.is_null else decode_value(node, options[0])
    if get_origin(base) is tuple:
        example = next((meta.examples[0] for meta in metas if meta.examples), "")
        return tuple(decode_value(child, options[0]) for child in node.sequence(example))
    if get_origin(base) is Literal:
        return node.choice(options)
    if base is str:
        return node.text()
    if issubclass(base, Record):
        return decode(node, base)
    refusal = node.error(f"expected a {_describe_type(type_)}, got {node.describe()}")
    try:
        number = msgspec.convert(node.plain(), type_)
    except msgspec.ValidationError as error:
        raise refusal from error
    if not math.isfinite(number):
        raise refusal
    return number


def describe_keys(record: type[Record], path: str = "") -> list[KeyRow]:
    """Return the keys of a record for people, in order. path: where the record stands in the file."""
    rows = []
    types = get_type_hints(record, include_extras=True)
    for field in msgspec.structs.fields(record):
        _, *metas = get_args(types[field.name])
        [(meaning, example)] = [(meta.description, meta.examples[0].strip()) for meta in metas if meta.description]
        default = _find_extra(metas, "default") or ("none" if field.default in (None, "", ()) else f"{field.default}")
        default = "required" if field.required else default
        dotted = f"{path}.{field.name}" if path else field.name
        rows.append(KeyRow(dotted, _describe_type(types[field.name]), default, meaning, example))
    return rows


def _describe_type(type_: Any) -> str:
    base, *metas = get_args(type_) if get_origin(type_) is Annotated else (type_,)
    options = get_args(base)
    if text := _find_extra(metas, "allowed"):
        return str(text)
    if type(None) in options:
        return _describe_type(options[0])
    if get_origin(base) is tuple:
        return f"list, each a {_describe_type(options[0])}"
    return " | ".join(options) if get_origin(base) is Literal else "text"


def _find_extra(metas: list[msgspec.Meta], name: str) -> Any:
    return next((meta.extra[name] for meta in reversed(metas) if meta.extra and meta.extra.get(name)), None)
