"""Lets the tests parse faster: jsonargparse remembers what it has worked out about options and parts.

Hundreds of tests parse a command line in process, and most of that time goes into six functions of jsonargparse and
Lightning. The answers are the same. Tests that start a process, as a user does, run jsonargparse as it is.
"""

import sys
from argparse import Action
from collections.abc import Callable, Hashable
from enum import Enum
from typing import Any

from jsonargparse import ArgumentParser, Namespace, _actions, _common, _namespace, _subcommands, _typehints, _util
from lightning.pytorch.cli import LightningCLI

_PLAIN = ("builtins", "types", "typing", "abc", "collections.abc")
_find, _path, _key = _subcommands.find_action_and_subcommand, _util.get_import_path, Namespace._parse_key
_defaults, _parse = ArgumentParser.get_defaults, ArgumentParser.parse_object
_prepare = LightningCLI._prepare_subcommand_parser
_CONTEXT = (
    *(_common.lenient_check, _common.parsing_defaults, _common.validating_defaults, _common.load_value_mode),
    *(_common.nested_links, _subcommands.parse_kwargs, _typehints.sub_defaults, _typehints.allow_default_instance),
)
_LEAVES = (str, int, float, bool, type(None), type, Enum)
_FILES = (".yaml", ".yml", ".json")
_MANY = 20_000
_answers: dict[Hashable, Namespace] = {}
_parsers: dict[Hashable, tuple[Any, list[str]]] = {}


def install() -> None:
    """Replace the functions in every module of jsonargparse that has imported them."""
    _replace(_find, find_action_and_subcommand)
    _replace(_path, get_import_path)
    Namespace._parse_key = parse_key  # type: ignore[method-assign]
    ArgumentParser.get_defaults = get_defaults  # type: ignore[method-assign]
    ArgumentParser.parse_object = parse_object  # type: ignore[method-assign]
    LightningCLI._prepare_subcommand_parser = prepare_subcommand_parser  # type: ignore[method-assign]


def uninstall() -> None:
    """Put the functions of jsonargparse back."""
    _replace(find_action_and_subcommand, _find)
    _replace(get_import_path, _path)
    Namespace._parse_key = _key  # type: ignore[method-assign]
    ArgumentParser.get_defaults = _defaults  # type: ignore[method-assign]
    ArgumentParser.parse_object = _parse  # type: ignore[method-assign]
    LightningCLI._prepare_subcommand_parser = _prepare  # type: ignore[method-assign]
    _answers.clear()
    _parsers.clear()


def find_action_and_subcommand(parser: Any, dest: str, exclude: Any = None) -> tuple[Action | None, str | None]:
    """Find the option of a key; parsers with subcommands are left to jsonargparse."""
    actions = parser._actions
    state = (len(actions), id(actions[-1])) if actions else None
    known = vars(parser).get("_table")
    if known is None or known[0] != state:
        known = parser._table = (state, _table(actions))
    if known[1] is None:
        return _find(parser, dest, exclude)
    last = None
    for action in known[1].get(dest, ()):
        if exclude is not None and isinstance(action, exclude):
            continue
        if not isinstance(action, (_actions._ActionConfigLoad, _actions.ActionFail)):
            return action, None
        last = action
    return last, None


def _table(actions: list[Action]) -> dict[str, list[Action]] | None:
    """Return the options by each of their names, in order; None with subcommands."""
    if any(isinstance(action, _subcommands.ActionSubCommands) for action in actions):
        return None
    table: dict[str, list[Action]] = {}
    for action in actions:
        if not isinstance(action, _actions.non_parsing_actions):
            options = (option.removeprefix("--") for option in action.option_strings if option.startswith("--"))
            for name in dict.fromkeys((action.dest, *options)):
                table.setdefault(name, []).append(action)
    return table


def get_import_path(value: Any, known: dict[type, str | None] = {}) -> str | None:  # noqa: B006 - a cache
    """Remember the paths of the classes of type hints."""
    if not isinstance(value, type) or value.__module__ not in _PLAIN:
        return _path(value)
    if value not in known:
        known[value] = _path(value)
    return known[value]


def parse_key(self: Namespace, key: str) -> tuple[str, Namespace | None, str]:
    """Take a key without dots for what it is."""
    if type(key) is str and key and "." not in key and " " not in key:
        return _namespace.add_clash_mark(key), self, ""
    return _key(self, key)


def get_defaults(self: Any, skip_validation: bool = False, **options: Any) -> Namespace:
    """Keep the defaults of a class's parser; jsonargparse keeps the parser, and computes them each time."""
    if not vars(self).get("_inner_parser") or options:
        return _defaults(self, skip_validation, **options)
    known = vars(self).setdefault("_known_defaults", {})
    state = (skip_validation, _common.lenient_check.get(), _typehints.sub_defaults.get(), len(self._actions))
    if state not in known:
        known[state] = _defaults(self, skip_validation)
    return known[state].clone()


def parse_object(self: Any, obj: Any, namespace: Any = None, **options: Any) -> Namespace:
    """Remember what the parser of a class answers to the same options, of the same part before, in the same context.

    A mistake is parsed again, and so are values that name a file, which may have changed.
    """
    if not vars(self).get("_inner_parser"):
        return _parse(self, obj, namespace, **options)
    try:
        context = [variable.get() for variable in _CONTEXT]
        asked = (self, _freeze(obj), _freeze(namespace), _freeze(options), _freeze(context))
    except _NotKeptError:
        return _parse(self, obj, namespace, **options)
    if asked not in _answers:
        answer = _parse(self, obj, namespace, **options)
        if len(_answers) >= _MANY:
            _answers.clear()
        _answers[asked] = answer.clone()
        return answer
    return _answers[asked].clone()


def prepare_subcommand_parser(self: Any, klass: type, subcommand: str, references: Any = None, **options: Any) -> Any:
    """Keep the parser of a subcommand of `moevlm`; a process of a user has one command line."""
    if references is None:  # a plain LightningCLI, whose parser has no such option
        return _prepare(self, klass, subcommand, **options)
    asked = (type(self), klass, subcommand, _freeze(options))
    if asked not in _parsers:
        parser = _prepare(self, klass, subcommand, references=references, **options)
        _parsers[asked] = parser, self._subcommand_method_arguments[subcommand]
    parser, self._subcommand_method_arguments[subcommand] = _parsers[asked]
    parser._references = references
    return parser


class _NotKeptError(Exception):
    """A value that may mean something else the next time."""


def _freeze(value: Any) -> Hashable:
    """Return what is equal for equal values of equal types alone: 1, 1.0 and True differ."""
    if isinstance(value, Namespace | dict):
        entries = vars(value) if isinstance(value, Namespace) else value
        return type(value), *((key, _freeze(each)) for key, each in entries.items())
    if isinstance(value, list | tuple | set):
        return type(value), *map(_freeze, value)
    if not isinstance(value, _LEAVES) or (isinstance(value, str) and value.endswith(_FILES)):
        raise _NotKeptError
    return type(value), value


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("jsonargparse._"):
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)
