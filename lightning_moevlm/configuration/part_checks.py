"""Refuses parts that cannot be built, before anything is built: null for an option without null, abstract classes.

The parser accepts a file's null for any option, and then fails internally or passes None to a constructor. Of classes
it checks only the ancestry.
"""

import inspect
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_args

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.messages.signatures import (
    classes_of,
    describe_type,
    find_imported_class,
    get_option_type,
    join_if_few,
    list_options,
    list_subclasses,
)


def refuse_unbuildable(key: str, part: type, options: Mapping[str, Any]) -> None:
    """Refuse abstract classes, and null for options of a class or its parts that do not allow it.

    Args:
        key: of the class in the configuration, "model".
        part: the class.
        options: its options, resolved; parts as `{class_path, init_args}`, or in a list.
    """
    for name in list_options(part):
        annotation = get_option_type(part, name)
        if name in options and annotation is not None:
            _refuse(f"{key}.{name}", annotation, options[name])


def _refuse(key: str, annotation: object, value: Any) -> None:
    classes = classes_of(annotation)
    if value is None:
        if not _allows_null(annotation):
            raise UserError(f"{key} is null, which is not allowed: {_advise(key, annotation, classes)}")
    elif isinstance(value, Mapping) and "class_path" in value:
        named = find_imported_class(value["class_path"])
        if named is not None:
            refuse_abstract(key, named)
            refuse_unbuildable(f"{key}.init_args", named, value.get("init_args") or {})
    elif isinstance(value, list):
        for place, item in enumerate(value):
            if isinstance(item, Mapping) and "class_path" in item:
                _refuse(f"{key}.{item['class_path'].rpartition('.')[2] or place}", object, item)
    elif isinstance(value, Mapping) and len(classes) == 1 and is_dataclass(classes[0]):
        refuse_unbuildable(key, classes[0], value)


def refuse_abstract(key: str, named: type) -> None:
    """Refuse an abstract class.

    Args:
        key: of the option that names it.
        named: the class.
    """
    if not inspect.isabstract(named):
        return
    concrete = list_subclasses(named)[0]
    choice = join_if_few(concrete)
    members = inspect.getmembers(named)
    lacks = ", ".join(name for name, member in members if getattr(member, "__isabstractmethod__", False))
    advice = (f"choose {choice}" if choice else "`moevlm list` shows the choices") if concrete else f"implement {lacks}"
    raise UserError(f"{key}: {named.__name__} is abstract; {advice}")


def _allows_null(annotation: object) -> bool:
    return annotation in (None, NoneType, Any, object) or NoneType in get_args(annotation)


def _advise(key: str, annotation: object, classes: list[type]) -> str:
    """Return the values to give; in a group of switches, each has its own value or null."""
    if len(classes) != 1 or not is_dataclass(classes[0]):
        return f"give {describe_type(annotation)}, or leave the option out for its default"
    names = list_options(classes[0])
    nullable = [name for name in names if _allows_null(get_option_type(classes[0], name))]
    advice = f"; null turns off {', '.join(nullable)}" if nullable else ""
    return f"it is a group of options; set those ({', '.join(f'{key}.{name}' for name in names[:2])}, ...){advice}"
