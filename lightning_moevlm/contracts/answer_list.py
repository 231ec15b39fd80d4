"""The answers or classes that a model chooses from: a JSON file of `moevlm data answers`, or lines of names.

The JSON file has one class per answer, the most frequent first. Lines are those of CLIP_benchmark's classnames.txt.
"""

import json
from pathlib import Path
from typing import NamedTuple

import msgspec

from lightning_moevlm.common.atomic_files import write_atomically
from lightning_moevlm.common.errors import UserError

ANSWERS_FILE = "answers.json"


class AnswerList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answers with how often each was given, and the digest of the set that they were counted in."""

    answers: tuple[str, ...]
    counts: tuple[int, ...]
    manifest: str


class Coverage(NamedTuple):
    """How much of the training questions a list can answer."""

    num_questions: int
    share: float  # of the questions that have an answer in the list


def read_answers(path: Path) -> AnswerList:
    """Read a list.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=AnswerList)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); `moevlm data answers SET` writes it into the set's folder"
        ) from None
    except msgspec.MsgspecError as error:
        raise UserError(
            f"{path} is not a list of answers ({error}); write it again with `moevlm data answers SET`"
        ) from None
    if not found.answers or len(set(found.answers)) < len(found.answers) or len(found.answers) != len(found.counts):
        raise UserError(f"{path} names no answer, or one twice; write it again with `moevlm data answers SET`")
    return found


class ClassNames(NamedTuple):
    """Classes, in the order of their numbers.

    names: as texts call them.
    path: the file, for messages.
    """

    names: tuple[str, ...]
    path: Path

    def number(self, label: str) -> int:
        """Return the number of a sample's class: a name, or the number from 0 of its line.

        Raises:
            UserError: it is neither, or a name that could be both.
        """
        by_name = [index for index, name in enumerate(self.names) if name == label]
        by_number = [int(label)] if label.isdecimal() and int(label) < len(self.names) else []
        found = set(by_name) if self.path.suffix == ".json" else {*by_name, *by_number}
        if len(found) == 1:
            return found.pop()
        if found:
            raise UserError(
                f"a sample has the class {label!r}, which {self.path} gives to lines {sorted(found)} (from 0): give a "
                "list of names that differ from each other and from numbers"
            )
        raise UserError(
            f"a sample has the class {label!r}, which is not one of the {len(self.names)} names in {self.path}, nor "
            "the number of one; give the list of this set, as `moevlm data answers SET --annotation FIELD` writes it"
        )


def read_classes(path: Path) -> ClassNames:
    """Read a list of classes: a JSON file of `moevlm data answers`, or a text file with a name per line.

    Raises:
        UserError: the file is missing or empty, or holds something else.
    """
    names = read_answers(path).answers if path.suffix == ".json" else read_lines(path, "classes")
    return ClassNames(names, path)


def read_lines(path: Path, what: str) -> tuple[str, ...]:
    """Read a text file with an entry per line; empty lines are left out.

    Raises:
        UserError: the file is missing, empty or not UTF-8; it is called by `what`.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"{what} {path} cannot be read ({error}); give a text file, one per line") from None
    found = tuple(line for line in lines if line)
    if not found:
        raise UserError(f"{what} {path} is empty; give one per line")
    return found


def write_answers(answers: AnswerList, path: Path) -> None:
    """Write a list whole."""
    write_atomically(path, json.dumps(msgspec.to_builtins(answers), ensure_ascii=False, indent=1) + "\n")
