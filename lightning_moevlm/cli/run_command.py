"""Commands other than training: typed functions and records; signatures are the options, docstrings the help."""

import re
from argparse import HelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, auto_cli

from lightning_moevlm.cli import bench, compare, parts, sweep
from lightning_moevlm.cli.data import commands as data
from lightning_moevlm.cli.models import audit, export
from lightning_moevlm.cli.runs import experts, replay, spikes, sync
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.messages.parse_errors import short_message

COMMANDS: dict[str, Any] = {
    "bench": bench.COMMANDS,
    "data": data.COMMANDS,
    "sweep": sweep.COMMANDS,
    "compare": compare.compare,
    "audit": audit.audit,
    "experts": experts.experts,
    "export": export.export,
    "replay": replay.replay,
    "spikes": spikes.spikes,
    "sync": sync.sync,
    "list": parts.list_parts,
    "describe": parts.describe,
}
# Options in their signatures, because they may be left out; but people type `moevlm list routers`.
_FIRST = {"list": "--kind", "describe": "--name", "sync": "--folder", "audit": "--path"}
# jsonargparse reads an option --config itself and leaves it out, so the parameter has another name
_CONFIG = {"-c": "--configuration", "--config": "--configuration"}
# What people type for an option; an ending + adds to its list, so that it may be repeated.
_SPELLINGS: dict[str, dict[str, str]] = {
    "audit": _CONFIG,
    "export": _CONFIG,
    "describe": dict.fromkeys(("-c", "--config", "--configs"), "--configs+"),
    "replay": {"--with": "--changes+"},
}
_GROUPS = {
    "bench": "Time dispatchers, layers, steps and data on this machine.",
    "data": "Make, convert, check and show sets of shards.",
    "data build": "Draw a demo set.",
    "data convert": "Make a set of your own images and captions.",
    "sweep": "Plan, run and report studies.",
}


def run_command(arguments: Sequence[str]) -> int:
    """Parse and run; a command that returns an int sets the exit code.

    Raises:
        UserError: an unknown command, option or value.
    """
    words = [_underscore(argument) for argument in arguments]
    if words[0] in _FIRST and len(words) > 1 and not words[1].startswith("-"):
        words.insert(1, _FIRST[words[0]])
    words = [_respell(word, _SPELLINGS.get(words[0], {})) for word in words]
    if words[0] == "sweep":
        words = sweep.expand_shorthand(words)
    if words[0] == "experts":
        words = experts.expand_shorthand(words)
    if words[0] == "compare":
        words = compare.expand_shorthand(words)
    try:
        commands = _with_help(_narrow(COMMANDS, words))
        result = auto_cli(
            commands, args=words, parser_class=_Parser, prog="moevlm", exit_on_error=False, allow_abbrev=False
        )
    except ArgumentError as error:
        raise UserError(_explain_missing(str(error)) or short_message(str(error), _types(words))) from error
    if is_dataclass(result):  # a command that is a record of its options
        result = result()  # type: ignore[operator]
    return result if isinstance(result, int) else 0


class _Parser(ArgumentParser):
    """Shows options as people type them, without those of jsonargparse's own that no guide names."""

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Return the page; only an error or the end of the program follows it."""
        typed: dict[str, list[str]] = {}
        for word, option in _SPELLINGS.get(self.prog.split()[-1], {}).items():
            typed.setdefault(option.strip("-+"), []).append(word)
        for action in self._actions:
            if set(action.option_strings) & {"--config", "--print_config"}:
                action.help = SUPPRESS
            elif action.dest in typed:
                action.option_strings = typed[action.dest]
        self.prog = self.prog.replace(" [options]", "")
        return super().format_help(formatter)


def _narrow(commands: Any, words: Sequence[str]) -> Any:
    """Return the command of the words alone, in its groups; all of a group whose next word is none of its commands.

    A parser of all commands takes a tenth of a second to build.
    """
    if not isinstance(commands, dict) or not words or words[0] not in commands:
        return commands
    return {words[0]: _narrow(commands[words[0]], words[1:])}


def _with_help(commands: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return the commands with the help of their groups, under the key that auto_cli reads."""
    groups = {
        name: _with_help(command, f"{above} {name}".strip()) if isinstance(command, dict) else command
        for name, command in commands.items()
    }
    return {"_help": _GROUPS[above], **groups} if above else groups


def _explain_missing(message: str) -> str:
    """Return which argument a command lacks, in the command's words; empty for another mistake."""
    lacks = re.fullmatch(r"the following arguments are required: ([\w.]+)\.(\w+)", message.strip())
    if lacks is None:
        return ""
    command = f"moevlm {lacks[1].replace('.', ' ')}"
    return f"{command} needs {lacks[2].upper()}; `{command} --help` explains it"


def _types(words: Sequence[str]) -> dict[str, object]:
    """Return the annotation of every option of the command."""
    command: Any = COMMANDS
    for word in words:
        if not isinstance(command, dict) or word not in command:
            break
        command = command[word]
    return {} if isinstance(command, dict) else get_type_hints(command)  # of a record, its fields


def _respell(argument: str, spellings: Mapping[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return spellings.get(name, name) + equals + value


def _underscore(argument: str) -> str:
    """Let --num-samples stand for --num_samples, the name in the signature."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if argument.startswith("--") else argument
