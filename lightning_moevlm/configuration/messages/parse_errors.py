"""Shortens the parser's errors to one line: the whole key, the mistake, the allowed values.

Texts of other forms pass unchanged.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import get_args

from yaml import YAMLError

from lightning_moevlm.common.nearest_name import find_nearest
from lightning_moevlm.common.yaml_text import read_yaml
from lightning_moevlm.configuration.messages.complaints import RAW, Complaint, read_complaints
from lightning_moevlm.configuration.messages.signatures import (
    classes_of,
    describe_type,
    find_imported_class,
    find_keys,
    get_option_type,
    is_record,
    join_if_few,
    list_options,
    list_subclasses,
    literals_of,
)

_NO_CLASS = re.compile(r"(?:Expected a dot import path string|Unexpected import path format): (\S+?)\.?(?: |$)")
_CLASS_NAME = re.compile(r"[A-Z]\w*|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_OTHER_CLASS = re.compile(r"Expected '(\S+)' to be (?:a subclass of|a function that returns) ")
_OTHER_RECORD = re.compile(r"Subclasses are disabled for (\w+), thus '([^']+)' is not accepted")
_NO_VALUE = re.compile(r"argument --([\w.]+): expected one argument")
_NO_OPTION = re.compile(r"^(?:Group '([^']+)' does not accept option|Option) '([^']+)'")
_UNKNOWN = re.compile(r"()(?:[Uu]nrecognized arguments: --|Subcommand '\w+' does not accept option ')([\w.-]+)")
_NO_SUBCOMMAND = re.compile(
    r'expected "(?:(\w+(?:\.\w+)*)\.)?subcommand" to be one of \{(.*)\}, but it was not provided'
)
_NO_COMMAND = re.compile(r"argument subcommand: invalid choice: '([^']*)' \(choose from (.*)\)")
_NO_MODULE = re.compile(r"No module named '([^']+)'")
_NO_ATTRIBUTE = re.compile(r"^module '([^']+)' has no attribute '([^']+)'")
_MISSING = re.compile(r"the following arguments are required: (.+)")

Types = Mapping[str, object]
"""The annotation of every option by its whole key, `trainer.max_steps`; None for a group of options."""


def short_message(message: str, types: Types | None = None) -> str:
    """Return one line: the place, the value, the change to make.

    Args:
        message: the parser's, of any number of lines.
        types: of the parser's options.
    """
    known = types or {}
    if command := _NO_COMMAND.search(message):
        return explain_unknown_command(command[1], re.findall(r"[\w-]+", command[2]))
    if parent := _NO_SUBCOMMAND.search(message):
        return f"moevlm {(parent[1] or '').replace('.', ' ')} needs a command; choose {parent[2].replace(',', ', ')}"
    if lonely := _NO_VALUE.fullmatch(message.strip()):
        return (
            f"--{lonely[1]} needs a value; for help on an option inside it, give the configuration first: "
            f"-c FILE --{lonely[1]}.help"
        )
    complaints = read_complaints(message)
    first = complaints[0]
    where = ".".join(first.keys)
    text = (
        _explain_option(complaints, where, known)
        or _explain_record(complaints, where)
        or _explain_class(complaints, where, known)
        or _explain_value(complaints, where, known)
    )
    return text or (f"{where}: {first.text}" if where else _explain_part(complaints) or " ".join(message.split()))


def explain_missing_module(name: str) -> str:
    """Return the message for a missing module, with the places that are searched."""
    return (
        f"there is no module {name}; if it is a module of your own, set PYTHONPATH, as in `PYTHONPATH=. moevlm ...`, "
        "or install its package"
    )


def explain_unknown_command(name: str, commands: Sequence[str]) -> str:
    """Return the message for an unknown command."""
    return f"there is no command {name}; {_hint(name, commands)}choose {', '.join(commands)}"


def _find(complaints: Sequence[Complaint], *patterns: re.Pattern[str]) -> tuple[Complaint, re.Match[str]] | None:
    """Return the first complaint that a pattern fits, with its match."""
    pairs = ((each, pattern) for each in complaints for pattern in patterns)
    return next(((each, match) for each, pattern in pairs if (match := pattern.search(each.text))), None)


def _explain_option(complaints: Sequence[Complaint], where: str, types: Types) -> str | None:
    """Explain an unknown option: the nearest, or all."""
    found = _find(complaints, _NO_OPTION, _UNKNOWN)
    if found is None:
        return None
    each, refused = found
    option = ".".join(part for part in refused.groups() if part)
    records = [other.holder for other in complaints if other.holder and _NO_OPTION.search(other.text)]
    annotation = _annotation(each, types)
    if len(records) > 1 and annotation is not None:
        names = [name for record in records for name in list_options(record)]
        neither = " nor ".join(record.__name__ for record in records)
        return f"{where}: neither {neither} takes {option!r}; {_hint(option, names)}give {describe_type(annotation)}"
    if each.holder is not None and where:
        path, part, name = _first_unknown(each.holder, option)
        names = list_options(part)
        known = join_if_few(names)
        advice = f"it takes {known}" if known else f"`moevlm describe {part.__name__}` lists its options"
        hint = _hint(name, names) or _hint_deeper({key: get_option_type(part, key) for key in names}, name)
        return f"{'.'.join((where, *path))}: {part.__name__} takes no {name!r}; {hint}{advice}"
    if where:
        return None
    if not types:
        return f"{each.text}; --help lists the options"
    if not any("." in key for key in types):
        if option.split(".")[0] in ("data", "model", "trainer"):
            return f"there is no option --{option} here: write it into a file, and give that with -c after the others"
        return f"there is no option --{option}; {_hint(option, list(types), '--')}--help lists the options"
    above, name, names = _first_unknown_key(option, types)
    near = find_nearest(name, names)
    hint = f"did you mean {above}{near}? " if near else _hint_deeper(types, option.rpartition(".")[2])
    return f"there is no key {option}; {hint}`moevlm fit --help` lists the keys"


def _explain_record(complaints: Sequence[Complaint], where: str) -> str | None:
    """Explain a class that was named for a record, which takes only options."""
    found = _find(complaints, _OTHER_RECORD)
    if found is None:
        return None
    record, path = found[1].groups()
    named = find_imported_class(path)
    if named and any(other.holder is named and _MISSING.search(other.text) for other in complaints):
        return None  # another alternative takes it, and lacks options
    return (
        f"{where}: {path} is not allowed here; {record} is set by its options, not by another class: "
        f"`moevlm describe {record}` lists them, CONTRIBUTING.md explains how to add one"
    )


def _explain_class(complaints: Sequence[Complaint], where: str, types: Types) -> str | None:
    """Explain a missing module or class, or a class of another kind: the nearest of the right kind, or all if few."""
    if found := _find(complaints, _NO_MODULE):
        return f"{where}: {explain_missing_module(found[1][1])}"
    if found := _find(complaints, _NO_ATTRIBUTE):
        module, name = found[1].groups()
        classes = [key for key, value in vars(sys.modules[module]).items() if isinstance(value, type)]
        return f"{where}: module {module} has no class {name}; {_hint(name, classes)}".rstrip("; ")
    found = _find(complaints, _NO_CLASS, _OTHER_CLASS)
    if found is None:
        return None
    given = found[1][1]
    annotation = _annotation(found[0], types)
    below = [list_subclasses(base) for base in classes_of(annotation)]
    own = [name for names, _ in below for name in names]
    foreign = [name for _, names in below for name in names]
    choice = join_if_few(own)
    others = ", one of torch or Lightning" if foreign else ""
    advice = f"choose {choice}{others}" if choice else "`moevlm list` shows the choices"
    if found[1].re is _OTHER_CLASS:
        return f"{where}: {given} is not {describe_type(annotation)}; {advice}"
    near = find_nearest(given, own)
    if near is None or given.lower() not in near.lower():  # prefer ours
        near = find_nearest(given, [*own, *foreign])
    takes_numbers = any(kind in get_args(annotation) for kind in (float, int, bool))
    is_value = takes_numbers and near is None and not _CLASS_NAME.fullmatch(given)
    if below and (is_value or all(is_record(base) for base in classes_of(annotation))):
        return f"{where}: {given} is not a valid value; give {describe_type(annotation)}"
    if near:
        return f"{where}: there is no class {given}; did you mean {near}? {advice}"
    return f"{where}: there is no class {given}; {advice}, or give the full path of your own, my_package.{given}"


def _explain_value(complaints: Sequence[Complaint], where: str, types: Types) -> str | None:
    """Explain a value of the wrong type: the allowed ones."""
    first = complaints[0]
    for each in complaints:
        missing = _MISSING.match(each.text)
        if missing and each.holder is not None:
            return f"{where}: {each.holder.__name__} needs {missing[1]} too"
    annotation = _annotation(first, types)
    if not where or annotation is None or not re.match("Expected a(?! tuple)|Not a valid subclass", first.text):
        return None
    choice = join_if_few([name for base in classes_of(annotation) for name in list_subclasses(base)[0]])
    is_mapping = first.given is not None and first.given.startswith("{")
    if is_mapping and (loose := _beside_init_args(str(first.given))):
        return (
            f"{where}: options are given with and without init_args; write {where}.init_args.{loose} in place of "
            f"{where}.{loose}"
        )
    if choice and is_mapping and "'class_path'" not in str(first.given).split("'init_args'")[0]:
        return f"{where}: options without a class; give the class_path of {choice}, or first a configuration with it"
    if first.given is None or RAW.match(first.given):
        return f"{where}: give {describe_type(annotation)}"
    hint = _hint(first.given, literals_of(annotation))
    return f"{where}: {first.given} is not a valid value; {hint}give {describe_type(annotation)}"


def _explain_part(complaints: Sequence[Complaint]) -> str | None:
    """Return the part's own message, among complaints about other types that its option may have."""
    own = [each for each in complaints if not re.match("Expected a|Not a valid subclass", each.text)]
    if len(complaints) == 1 or not own:
        return None
    return f"{own[0].holder.__name__}: {own[0].text}" if own[0].holder else own[0].text


def _annotation(complaint: Complaint, types: Types) -> object:
    """Return the type of the last key's option; None if unknown."""
    if len(complaint.keys) == 1:
        return types.get(complaint.keys[0])
    if not complaint.keys or complaint.owner is None:
        return None
    *groups, name = complaint.keys[-1].split(".")
    part: type | None = complaint.owner
    for group in groups:
        classes = classes_of(get_option_type(part, group)) if part else []
        part = classes[0] if len(classes) == 1 else None
    return get_option_type(part, name) if part else None


def _first_unknown(holder: type, option: str) -> tuple[list[str], type, str]:
    """Return the known part of a dotted option below a class, the class that lacks the next name, and that name."""
    path: list[str] = []
    *groups, last = option.split(".")
    for name in groups:
        classes = classes_of(get_option_type(holder, name))
        if name not in list_options(holder) or len(classes) != 1:
            return path, holder, name
        path.append(name)
        holder = classes[0]
    return path, holder, last


def _first_unknown_key(option: str, types: Types) -> tuple[str, str, list[str]]:
    """Return the known part of a whole key with its dot, the unknown name, and the names to choose from."""
    above = ""
    for name in option.split("."):
        names = list(dict.fromkeys(key.removeprefix(above).split(".")[0] for key in types if key.startswith(above)))
        if name not in names:
            return above, name, names
        above += f"{name}."
    return above, "", []


def _beside_init_args(given: str) -> str | None:
    """Return the first option that stands beside `init_args` in a value, and not within."""
    with suppress(YAMLError):
        value = read_yaml(given)
        if isinstance(value, dict) and "init_args" in value:
            return next((key for key in value if key not in ("class_path", "init_args")), None)
    return None


def _hint(name: str, names: Sequence[str], prefix: str = "") -> str:
    near = find_nearest(name, names)
    return f"did you mean {prefix}{near}? " if near else ""


def _hint_deeper(types: Types, name: str) -> str:
    """Name the options of that name further down, which are written with all keys above them."""
    deeper = find_keys(types, name)
    return f"did you mean {' or '.join(deeper)}? " if deeper else ""
