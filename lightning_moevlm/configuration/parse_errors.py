"""What the command line's parser complains about, said from the place of the mistake instead of from the root.

jsonargparse wraps a mistake in a line per level above it, indented, and tells it once for every type that a value might
have had. Kept are the whole key, what is wrong there, and what would be right; texts of other forms pass unchanged.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lightning_moevlm.common.nearest_name import find_nearest
from lightning_moevlm.configuration.signatures import (
    classes_of,
    describe_type,
    few,
    find_imported_class,
    get_option_type,
    is_record,
    list_options,
    list_subclasses,
    literals_of,
)

_KEY = re.compile(r'(?:Parser key|argument) "([^"]+)": ?')
_CLASS = re.compile(r"Problem with given class_path '([^']+)': ?")
_FACTORY = re.compile(r"Type \S.*?\b([\w.]+)\](?: \| None|\])? expects a function or a callable class: ")
_PATH = re.compile(r"- Expected a path but .* either not accessible or invalid")
_UNION = "Does not validate against any of the Union subtypes"
_GIVEN = re.compile(r"Given value: (.*)")
_RAW_GOT = re.compile(r"\.? Got value: (?:Namespace|NestedArg)\(.*")  # all options of the part, after the mistaken one
_KINDS = re.compile(r" Subclass types expect one of: .*")  # of how a part may be given
_GOT = re.compile(r"\.? Got value: (.*)")
_REJECTED_CLASS = re.compile(r"class_path='([^']+)'")
_NO_CLASS = re.compile(r"(?:Expected a dot import path string|Unexpected import path format): (\S+?)\.?(?: |$)")
_OTHER_CLASS = re.compile(r"Expected '(\S+)' to be (?:a subclass of|a function that returns) ")
_OTHER_RECORD = re.compile(r"Subclasses are disabled for (\w+), thus '([^']+)' is not accepted")
_NO_VALUE = re.compile(r"argument --([\w.]+): expected one argument")
_NO_OPTION = re.compile(r"(?:Group '(?P<group>[^']+)' does not accept option|Option) '(?P<option>[^']+)'")
_UNKNOWN = re.compile(r"(?:[Uu]nrecognized arguments: --|Subcommand '\w+' does not accept option ')([\w.-]+)")
_NO_SUBCOMMAND = re.compile(
    r'expected "(?:(\w+(?:\.\w+)*)\.)?subcommand" to be one of \{(.*)\}, but it was not provided'
)
_NO_COMMAND = re.compile(r"argument subcommand: invalid choice: '([^']*)' \(choose from (.*)\)")
_NO_MODULE = re.compile(r"No module named '([^']+)'")
_MISSING = re.compile(r"the following arguments are required: (.+)")
_RAW = re.compile(r"(?:Namespace|NestedArg)\(")  # a value as only the parser knows it

Types = Mapping[str, object]
"""The annotation of every option by its whole key, `trainer.max_steps`; None for a group of options."""


class _Complaint(NamedTuple):
    """One of the things that are wrong with one value."""

    keys: tuple[str, ...]
    owner: type | None  # the class whose option the last key is
    holder: type | None  # the class that the value was taken for
    text: str
    given: str | None


def short_message(message: str, types: Types | None = None) -> str:
    """Return one line: where, what came, what to change.

    Args:
        message: the parser's, of any number of lines.
        types: of the options that the parser accepts.
    """
    known = types or {}
    command = _NO_COMMAND.search(message)
    if command:
        return explain_unknown_command(command[1], re.findall(r"[\w-]+", command[2]))
    parent = _NO_SUBCOMMAND.search(message)
    if parent:
        return f"moevlm {(parent[1] or '').replace('.', ' ')} needs a command; choose {parent[2].replace(',', ', ')}"
    lonely = _NO_VALUE.fullmatch(message.strip())
    if lonely:
        return (
            f"--{lonely[1]} needs a value; for help on an option inside it, give the configuration first: "
            f"-c FILE --{lonely[1]}.help"
        )
    lines = [line for line in message.splitlines() if line.strip() and not _PATH.match(line.strip())]
    complaints = list(_complaints(lines, _Complaint((), None, None, "", None)))
    depth = max(len(each.keys) for each in complaints)
    complaints = [each for each in complaints if len(each.keys) == depth]
    first = complaints[0]
    where = ".".join(first.keys)
    told = (
        _of_an_option(complaints, where, known)
        or _of_a_record(complaints, where)
        or _of_a_module(complaints, where)
        or _of_a_class(complaints, where, known)
        or _of_a_value(complaints, where, known)
    )
    return told or (f"{where}: {first.text}" if where else _of_a_part(complaints) or " ".join(message.split()))


def explain_missing_module(name: str) -> str:
    """Tell a module that is not found, and where modules are looked for."""
    return (
        f"there is no module {name}; one of your own is found by PYTHONPATH, as in `PYTHONPATH=. moevlm ...`, or as an "
        "installed package"
    )


def explain_unknown_command(name: str, commands: Sequence[str]) -> str:
    """Tell a command that is not there."""
    return f"there is no command {name}; {_meant(name, commands)}choose {', '.join(commands)}"


def _complaints(lines: Sequence[str], above: _Complaint) -> Iterator[_Complaint]:
    """Yield the leaves of the parser's tree; a line's depth is its indent."""
    keys, owner, holder, _, given = above
    rest = list(lines)
    text = rest.pop(0).strip().removeprefix("- ") if rest else ""
    while True:
        if match := _KEY.match(text):
            keys, owner, holder = (*keys, match[1]), holder, None
        elif match := _CLASS.match(text):
            holder = find_imported_class(match[1])
        elif match := _FACTORY.match(text):
            base = find_imported_class(match[1])
            named = [find_imported_class(path) for path in _REJECTED_CLASS.findall(text)]
            holder = next((part for part in named if part and base and issubclass(part, base)), base)
        elif not text and rest:
            text = rest.pop(0).strip().removeprefix("- ")
            continue
        else:
            break
        text = text[match.end() :]
    titles = [line.strip() for line in rest]
    if text == _UNION and "Errors:" in titles:
        behind = [found[1] for title in titles if (found := _GIVEN.match(title))]
        here = _Complaint(keys, owner, holder, "", behind[-1] if behind else given)
        for alternative in _alternatives(rest[titles.index("Errors:") + 1 :]):
            yield from _complaints(alternative, here)
        return
    whole = _RAW_GOT.sub("", _KINDS.sub("", " ".join(" ".join([text, *rest]).split())))
    got = _GOT.search(whole)
    yield _Complaint(
        keys, owner, holder, _GOT.sub("", whole) if got and _RAW.match(got[1]) else whole, got[1] if got else given
    )


def _alternatives(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yield the lines of each item of the list that they begin with."""
    indent = _indent(lines[0])
    item: list[str] = []
    for line in lines:
        if _indent(line) < indent:
            break
        if _indent(line) == indent and item:
            yield item
            item = []
        item.append(line)
    yield item


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _of_an_option(complaints: Sequence[_Complaint], where: str, types: Types) -> str | None:
    """Tell an option that nothing has: the nearest, or all."""
    for each in complaints:
        unknown, refused = _UNKNOWN.search(each.text), _NO_OPTION.match(each.text)
        if unknown or refused:
            break
    else:
        return None
    if refused:
        option = ".".join(part for part in (refused["group"], refused["option"]) if part)
    else:
        assert unknown is not None
        option = unknown[1]
    records = [other.holder for other in complaints if other.holder and _NO_OPTION.match(other.text)]
    annotation = _annotation(each, types)
    if len(records) > 1 and annotation is not None:
        names = [name for record in records for name in list_options(record)]
        return f"{where}: {_none_of(records)} takes {option!r}; {_meant(option, names)}give {describe_type(annotation)}"
    if each.holder is not None and where:
        path, part, name = _first_unknown(each.holder, option)
        names = list_options(part)
        known = few(names)
        advice = f"it takes {known}" if known else f"`moevlm describe {part.__name__}` lists its options"
        return f"{'.'.join((where, *path))}: {part.__name__} takes no {name!r}; {_meant(name, names)}{advice}"
    if where:
        return None
    if not types:
        return f"{each.text}; --help lists the options"
    above, name, names = _first_unknown_key(option, types)
    near = find_nearest(name, names)
    meant = f"did you mean --{above}{near}? " if near else ""
    came = each.text if each.text.lower().startswith("unrecognized") else f"there is no option {option}"
    return f"{came}; {meant}--help lists the options"


def _of_a_record(complaints: Sequence[_Complaint], where: str) -> str | None:
    """Tell a class that was named where only a record's own options are taken."""
    for each in complaints:
        refused = _OTHER_RECORD.search(each.text)
        if refused:
            named = find_imported_class(refused[2])
            if named and any(other.holder is named and _MISSING.search(other.text) for other in complaints):
                return None  # another alternative takes it, and lacks options
            return (
                f"{where}: {refused[2]} cannot stand here, for {refused[1]} is set by its options and takes no other "
                f"class; `moevlm describe {refused[1]}` lists them, CONTRIBUTING.md tells how to add one"
            )
    return None


def _of_a_module(complaints: Sequence[_Complaint], where: str) -> str | None:
    """Tell a class_path whose module is not found."""
    missing = next((found for each in complaints if (found := _NO_MODULE.search(each.text))), None)
    return f"{where}: {explain_missing_module(missing[1])}" if missing else None


def _of_a_class(complaints: Sequence[_Complaint], where: str, types: Types) -> str | None:
    """Tell a class that is not there, or of another kind: the nearest of the right kind, or all if they are few."""
    for each in complaints:
        missing, other = _NO_CLASS.search(each.text), _OTHER_CLASS.search(each.text)
        if missing or other:
            break
    else:
        return None
    annotation = _annotation(each, types)
    below = [list_subclasses(base) for base in classes_of(annotation)]
    own = [name for names, _ in below for name in names]
    foreign = [name for _, names in below for name in names]
    choice = few(own)
    others = ", one of torch or Lightning" if foreign else ""
    advice = f"choose {choice}{others}, or give a class_path" if choice else "`moevlm list` shows what can be named"
    if missing is None:
        assert other is not None
        return f"{where}: {other[1]} is not {describe_type(annotation)}; {advice}"
    if below and all(is_record(base) for base in classes_of(annotation)):  # a value is asked for, not a class
        return f"{where}: {missing[1]} is not a valid value; give {describe_type(annotation)}"
    near = find_nearest(missing[1], own)
    if near is None or missing[1].lower() not in near.lower():  # of equals, ours
        near = find_nearest(missing[1], [*own, *foreign])
    meant = f"did you mean {near}? " if near else ""
    return f"{where}: there is no class {missing[1]}; {meant}{advice}"


def _of_a_value(complaints: Sequence[_Complaint], where: str, types: Types) -> str | None:
    """Tell a value of a wrong type: what it may be."""
    first = complaints[0]
    for each in complaints:
        missing = _MISSING.match(each.text)
        if missing and each.holder is not None:
            return f"{where}: {each.holder.__name__} needs {missing[1]} too"
    annotation = _annotation(first, types)
    if not where or annotation is None or not re.match("Expected a|Not a valid subclass", first.text):
        return None
    choice = few([name for base in classes_of(annotation) for name in list_subclasses(base)[0]])
    if (
        first.given
        and first.given.startswith("{")
        and "'class_path'" not in first.given.split("'init_args'")[0]
        and choice
    ):
        return (
            f"{where}: options without a class; give the class_path of {choice}, or a configuration that has it before"
        )
    if first.given is None or _RAW.match(first.given):
        return f"{where}: give {describe_type(annotation)}"
    meant = _meant(first.given, literals_of(annotation))
    return f"{where}: {first.given} is not a valid value; {meant}give {describe_type(annotation)}"


def _of_a_part(complaints: Sequence[_Complaint]) -> str | None:
    """Tell what a part said when it was built, out of what is said of the types that its option might have had too."""
    own = [each for each in complaints if not re.match("Expected a|Not a valid subclass", each.text)]
    if len(complaints) == 1 or not own:
        return None
    return f"{own[0].holder.__name__}: {own[0].text}" if own[0].holder else own[0].text


def _annotation(complaint: _Complaint, types: Types) -> object:
    """Return the type of the option that the last key names; None where it cannot be told."""
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
    """Return how far a dotted option is known below a class, the class that does not know the next name, and that."""
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
    """Return the known part of a whole key with its dot, the name after it, and the names that there are instead."""
    above = ""
    for name in option.split("."):
        names = list(dict.fromkeys(key.removeprefix(above).split(".")[0] for key in types if key.startswith(above)))
        if name not in names:
            return above, name, names
        above += f"{name}."
    return above, "", []


def _none_of(records: Sequence[type]) -> str:
    return f"neither {' nor '.join(record.__name__ for record in records)}"


def _meant(name: str, names: Sequence[str]) -> str:
    near = find_nearest(name, names)
    return f"did you mean {near}? " if near else ""
