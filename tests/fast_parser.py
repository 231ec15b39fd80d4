"""Lets the tests parse faster: jsonargparse finds an option by a table, and keeps the defaults of each class.

Hundreds of tests parse a command line in process, and most of that time goes into four functions of jsonargparse.
The answers are the same. Tests that start a process, as a user does, run jsonargparse as it is.
"""

import sys
from argparse import Action
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, Namespace, _actions, _common, _namespace, _subcommands, _typehints, _util

_PLAIN = ("builtins", "types", "typing", "abc", "collections.abc")
_find, _path, _key = _subcommands.find_action_and_subcommand, _util.get_import_path, Namespace._parse_key
_defaults = ArgumentParser.get_defaults


def install() -> None:
    """Replace the functions in every module of jsonargparse that has imported them."""
    _replace(_find, find_action_and_subcommand)
    _replace(_path, get_import_path)
    Namespace._parse_key = parse_key  # type: ignore[method-assign]
    ArgumentParser.get_defaults = get_defaults  # type: ignore[method-assign]


def uninstall() -> None:
    """Put the functions of jsonargparse back."""
    _replace(find_action_and_subcommand, _find)
    _replace(get_import_path, _path)
    Namespace._parse_key = _key  # type: ignore[method-assign]
    ArgumentParser.get_defaults = _defaults  # type: ignore[method-assign]


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


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("jsonargparse._"):
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)
