"""Reads the complaints of jsonargparse from its text.

It wraps a mistake in one indented line per level above it, and repeats it for every type that a value may have.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lightning_moevlm.configuration.messages.signatures import find_imported_class

RAW = re.compile(r"(?:Namespace|NestedArg)\(")
"""A value as only the parser knows it."""

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


class Complaint(NamedTuple):
    """One complaint about a value."""

    keys: tuple[str, ...]
    owner: type | None  # the class that has the last key as an option
    holder: type | None  # the class that the parser tried for the value
    text: str
    given: str | None


def read_complaints(message: str) -> list[Complaint]:
    """Return the leaves of the parser's tree that are deepest in the configuration."""
    lines = [line for line in message.splitlines() if line.strip() and not _PATH.match(line.strip())]
    leaves = list(_leaves(lines, Complaint((), None, None, "", None)))
    depth = max(len(each.keys) for each in leaves)
    return [each for each in leaves if len(each.keys) == depth]


def _leaves(lines: Sequence[str], above: Complaint) -> Iterator[Complaint]:
    """Yield the leaves below a complaint; a line's depth is its indent."""
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
            named = [find_imported_class(path) for path in _REJECTED_CLASS.findall(" ".join(lines))]
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
        here = Complaint(keys, owner, holder, "", behind[-1] if behind else given)
        for alternative in _alternatives(rest[titles.index("Errors:") + 1 :]):
            yield from _leaves(alternative, here)
        return
    whole = _RAW_GOT.sub("", _KINDS.sub("", " ".join(" ".join([text, *rest]).split())))
    got = _GOT.search(whole)
    is_raw = got is not None and RAW.match(got[1]) is not None
    yield Complaint(keys, owner, holder, _GOT.sub("", whole) if is_raw else whole, got[1] if got else given)


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
