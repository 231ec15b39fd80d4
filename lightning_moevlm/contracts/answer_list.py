"""The answers that a model chooses from, as a JSON file: one class per answer, the most frequent first."""

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


def write_answers(answers: AnswerList, path: Path) -> None:
    """Write a list whole."""
    write_atomically(path, json.dumps(msgspec.to_builtins(answers), ensure_ascii=False, indent=1) + "\n")
