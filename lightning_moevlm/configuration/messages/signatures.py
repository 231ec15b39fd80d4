"""Reads options and types from signatures and describes them, for error messages.

A signature that cannot be read counts as empty, such as one whose annotations are not importable. A message then
advises less, but never fails.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NAMES: dict[object, str] = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}
_FOREIGN = ("torch", "lightning", "pytorch_lightning")
_FEW_KEYS = 3
_MANY = 8
"""Longest list in a message; `moevlm list` and `moevlm describe` show longer ones."""


def find_imported_class(path: str) -> type | None:
    """Return the class of a dotted path if its module is imported; imports nothing."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if inspect.isclass(found) else None


def list_options(part: type) -> list[str]:
    """Return the names of the constructor's options."""
    try:
        parameters = inspect.signature(part).parameters.values()
    except ValueError:
        return []
    return [
        each.name for each in parameters if each.kind is not each.VAR_POSITIONAL and each.kind is not each.VAR_KEYWORD
    ]


def get_option_type(part: type, name: str) -> object:
    """Return the annotation of one option; None if it cannot be read."""
    return _types_of(part).get(name)


@cache
def _types_of(part: type) -> dict[str, object]:
    try:
        return get_type_hints(inspect.getattr_static(part, "__init__"))
    except (NameError, TypeError, AttributeError):
        return {}


def classes_of(annotation: object) -> list[type]:
    """Return the classes in an annotation: A for `A | list[A] | None` and for `Callable[..., A]`."""
    if get_origin(annotation) is Callable:
        return classes_of(get_args(annotation)[-1]) if get_args(annotation) else []  # a bare Callable names no class
    if inspect.isclass(annotation) and get_origin(annotation) is None:
        return [] if annotation in _NAMES else [annotation]
    found = [part for argument in get_args(annotation) for part in classes_of(argument)]
    return list(dict.fromkeys(found))


def literals_of(annotation: object) -> list[str]:
    """Return the values of a `Literal`, or of the literals in a union."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) in (Union, UnionType):
        return [value for part in get_args(annotation) for value in literals_of(part)]
    return []


def list_subclasses(base: type) -> tuple[list[str], list[str]]:
    """Return the concrete imported classes below `base`, itself included: ours and plug-ins', then torch's and
    Lightning's."""
    below = {base}
    waiting = [base]
    child: type
    while waiting:
        for child in type.__subclasses__(waiting.pop()):
            if child not in below:
                below.add(child)
                waiting.append(child)
    own: set[str] = set()
    foreign: set[str] = set()
    for part in below:
        if not inspect.isabstract(part) and not part.__name__.startswith("_") and "._" not in part.__module__:
            (foreign if part.__module__.split(".")[0] in _FOREIGN else own).add(part.__name__)
    return sorted(own), sorted(foreign - own)


def find_keys(types: Mapping[str, object], name: str) -> list[str]:
    """Return the whole keys whose last part is `name`, shortest first; none if they are many.

    Args:
        types: annotations by known key. Items of a list have no key.
        name: the last part.
    """
    level, seen, found = list(types.items()), set[type](), dict[str, None]()
    while level:
        found |= dict.fromkeys(key for key, _ in level if key.split(".")[-1] == name)
        below = []
        for key, annotation in level:
            is_list = any(get_origin(part) is list for part in get_args(annotation))
            for base in () if is_list else classes_of(annotation):
                for part in sorted({base, *_own_subclasses(base)} - seen, key=lambda each: each.__name__):
                    seen.add(part)
                    inner = key if is_record(part) else f"{key}.init_args"
                    below += [(f"{inner}.{option}", get_option_type(part, option)) for option in list_options(part)]
        level = below
    return list(found) if len(found) <= _FEW_KEYS else []


def _own_subclasses(base: type) -> list[type]:
    found: list[type] = []
    child: type
    for child in type.__subclasses__(base):
        if child.__module__.split(".")[0] not in _FOREIGN and "._" not in child.__module__:
            found += [child, *_own_subclasses(child)]
    return found


def is_record(part: type) -> bool:
    """Return whether the class is a dataclass without subclasses, so that its fields are its only options."""
    return is_dataclass(part) and not type.__subclasses__(part)


def describe_type(annotation: object) -> str:
    """Return a type in words, e.g. "a number, a Ramp {start, stop, num_steps, begin, shape} or null"."""
    return _join(list(dict.fromkeys(_alternatives(annotation))))


def join_if_few(names: Sequence[str]) -> str | None:
    """Return a short list of names as "a, b or c"; None if it is empty or long."""
    return _join(names) if 0 < len(names) <= _MANY else None


def _alternatives(annotation: object) -> list[str]:
    if get_origin(annotation) in (Union, UnionType):
        return [words for part in get_args(annotation) for words in _alternatives(part)]
    if get_origin(annotation) is Literal:
        return literals_of(annotation)
    if isinstance(annotation, type) and is_record(annotation):
        return [f"{_with_article(annotation.__name__)} {{{', '.join(list_options(annotation))}}}"]
    classes = classes_of(annotation)
    return [_NAMES.get(annotation) or (_with_article(classes[0].__name__) if classes else _plain(annotation))]


def _with_article(name: str) -> str:
    """Return "an Optimizer", "an LRScheduler" (spelled, el ar) or "a Router"."""
    is_spelled = name[:2].isupper()
    return f"{'an' if name[0] in ('AEFHILMNORSX' if is_spelled else 'AEIO') else 'a'} {name}"


def _plain(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
