"""Converts JSON values to typed records; errors name the file, the key and the value."""

import re
from typing import Any, TypeVar

import msgspec

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.nearest_name import suggest

T = TypeVar("T")
_AT = re.compile(r"(?P<reason>.*?)( - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.+)`")
_KINDS = {type(None): "null", bool: "bool", int: "int", float: "float", str: "str", list: "array", dict: "object"}


def convert_record(content: object, kind: type[T], place: str) -> T:
    """Return parsed JSON as a record. Fields that the record does not have are ignored.

    Args:
        content: Value that `json.loads` returned.
        kind: Dataclass or `msgspec.Struct` to make of it.
        place: File or address of the JSON, for messages.

    Raises:
        UserError: if a field is missing or has the wrong type or value.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        found = _AT.fullmatch(str(error))
        assert found is not None
        path = _name_entry(content, found["path"] or "", found["reason"])
        missing = _MISSING.fullmatch(found["reason"])
        if missing is None:
            reason, value = found["reason"].replace("`", "").replace("Expected", "expected"), _value_at(content, path)
            got = f", got {value!r}" if isinstance(value, int | float | str) and ", got " not in reason else ""
            raise UserError(
                f"{place}: {path or 'the whole file'}: {reason}{got}; restore it or rebuild the set"
            ) from None
        key = f"{path}.{missing[1]}".removeprefix(".")
        hint = "" if path else suggest(missing[1], _unknown_keys(content, kind))
        raise UserError(f"{place}: field {key!r} is missing; {hint}restore it or rebuild the set") from None


def _unknown_keys(content: object, kind: type) -> list[str]:
    known = {field.name for field in msgspec.inspect.type_info(kind).fields}  # type: ignore[attr-defined]
    return [key for key in content if key not in known] if isinstance(content, dict) else []


def _name_entry(content: object, path: str, reason: str) -> str:
    """Replace the `[...]` that msgspec writes for the key of a mapping by the key."""
    if not path.endswith("[...]"):
        return path
    holder = _value_at(content, path.removesuffix("[...]"))
    assert isinstance(holder, dict)
    got = reason.rpartition("got `")[2].removesuffix("`")
    return f"{path.removesuffix('[...]')}.{next((key for key in holder if _KINDS[type(holder[key])] == got), '?')}"


def _value_at(content: Any, path: str) -> Any:
    for key, number in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        content = content[key or int(number)]
    return content
