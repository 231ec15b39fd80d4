"""Every command and option with its type: a new one, or one that goes, is a decision and shows here.

After a change that is meant: make options-golden, and read the difference.
"""

import inspect
import os
import re
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lightning_moevlm.cli.parts import _parts
from lightning_moevlm.cli.run_command import COMMANDS
from lightning_moevlm.cli.training import CommandLine
from lightning_moevlm.configuration.parsers import list_option_types, prepare_parsers
from tests.conftest import PROJECT

GOLDEN = PROJECT / "tests/golden/options.txt"


def test_options_are_the_frozen_ones() -> None:
    lines = sorted([*training_options(), *command_options(COMMANDS, ""), *part_options()])
    if os.environ.get("MOEVLM_WRITE_GOLDEN") == "1":
        GOLDEN.write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = GOLDEN.read_text(encoding="utf-8").splitlines()
    new, gone = sorted({*lines} - {*known}), sorted({*known} - {*lines})
    assert (new, gone) == ([], []), "options changed; if that is meant: make options-golden"


def test_a_new_option_shows() -> None:
    def plan(file: str, jobs: int | None = None) -> None: ...

    found = {*command_options({"sweep": {"plan": plan}}, "")}
    assert found == {"sweep plan --file: str", "sweep plan --jobs: int | None"}


class _ParserReadyError(Exception):
    """Ends a command line before it is parsed."""


class _ParserOnly(CommandLine):
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.types = list_option_types(self._parser(self._asked))
        raise _ParserReadyError


def training_options() -> Iterator[str]:
    prepare_parsers()
    commands = defaultdict[str, list[str]](list)
    for command in ("fit", "validate", "test", "predict"):
        line = _ParserOnly.__new__(_ParserOnly)
        with pytest.raises(_ParserReadyError):
            line.__init__(command, [command], lambda: None)  # type: ignore[misc]
        for option, annotation in line.types.items():
            if annotation is not None:  # None is a group of options
                commands[f"--{option}: {text_of(annotation)}"].append(command)
    return (f"{'|'.join(names)} {option}" for option, names in commands.items())


def command_options(commands: Mapping[str, Any], above: str) -> Iterator[str]:
    for name, command in commands.items():
        if isinstance(command, Mapping):
            yield from command_options(command, f"{above}{name} ")
        elif callable(command):
            yield from (f"{above}{name} --{option}" for option in signature_of(command))


def part_options() -> Iterator[str]:
    """The options of the parts that a configuration can name, as `moevlm describe` shows them."""
    for parts in _parts().values():
        for part in parts:
            if part.__module__.startswith("lightning_moevlm."):
                yield from (f"{part.__name__} {option}" for option in signature_of(part))


def signature_of(part: Callable[..., Any]) -> Iterator[str]:
    hints = typing.get_type_hints(part.__init__ if isinstance(part, type) else part)  # type: ignore[misc]
    return (f"{name}: {text_of(hints.get(name))}" for name in inspect.signature(part).parameters)


def text_of(annotation: object) -> str:
    """Return a type without the modules of its classes: a move is no new option."""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(annotation))
