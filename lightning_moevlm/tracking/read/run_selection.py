"""Finds runs by a name, an id or its first digits, or tags that they share."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking.read.runs import RunRow, find_runs_anywhere

_ID = re.compile(r"[0-9a-f]{4,32}")  # shorter beginnings would fit by chance
_SAYABLE = re.compile(r"[^'\"`\\]+")  # MLflow's filter language has no escapes
_ROLE, _ROLES_LEFT_OUT = "role", ("summary", "replaced")
SHOWN_DIGITS = 8
"""Digits of a run's id in tables and messages."""


def choose_runs(uri: str, words: Sequence[str]) -> list[RunRow]:
    """Return the runs that the words name, in the words' order, each once; for tags the oldest first.

    Args:
        uri: as `resolve_tracking_uri` returns it.
        words: a run's name, its id or at least 4 of its first digits, or `TAG=VALUE[,TAG=VALUE]` for all runs with
            these tags except reports of studies and runs that were trained again.

    Raises:
        UserError: a word names no run (the message names the nearest), or a name or an id names several.
        MlflowException: the store cannot be read.
    """
    chosen: dict[str, RunRow] = {}
    for word in words:
        for row in _find_named(uri, word):
            chosen.setdefault(row.run_id, row)
    return list(chosen.values())


def name_run(row: RunRow) -> str:
    """Return a run's name and first digits, for messages."""
    return f"{row.name} ({row.run_id[:SHOWN_DIGITS]})"


def _find_named(uri: str, word: str) -> list[RunRow]:
    found = _by_id(uri, word) if len(word) == 32 else []
    found = found or _by_name(uri, word)
    if not found and "=" in word:
        return _by_tags(uri, word)
    found = found or _by_id(uri, word)
    if len(found) > 1:
        ids = ", ".join(f"{row.run_id} in experiment {row.experiment_id}" for row in found)
        raise UserError(f"{word!r} names {len(found)} runs, {ids}; give more digits of the id")
    if not found:
        raise _unknown(uri, word)
    return found


def _by_name(uri: str, word: str) -> list[RunRow]:
    where = f"attributes.run_name = '{word}'" if _SAYABLE.fullmatch(word) else ""
    return [row for row in find_runs_anywhere(uri, where=where) if row.name == word]


def _by_id(uri: str, word: str) -> list[RunRow]:
    return find_runs_anywhere(uri, where=f"attributes.run_id LIKE '{word}%'") if _ID.fullmatch(word) else []


def _by_tags(uri: str, word: str) -> list[RunRow]:
    tags: dict[str, str] = {}
    for part in word.split(","):
        tag, equals, value = part.partition("=")
        if not equals or not tag:
            raise UserError(f"{word!r}: tags are written TAG=VALUE[,TAG=VALUE], e.g. sweep=quickstart,seed=0")
        tags[tag] = value
    found = [row for row in find_runs_anywhere(uri, tags) if row.tags.get(_ROLE) not in _ROLES_LEFT_OUT]
    if not found:
        raise _no_such_tags(uri, word, tags)
    return found


def _no_such_tags(uri: str, word: str, tags: Mapping[str, str]) -> UserError:
    rows = find_runs_anywhere(uri)
    for tag, value in tags.items():
        values = {row.tags[tag] for row in rows if tag in row.tags}
        if not values:
            names = {name for row in rows for name in row.tags if not name.startswith("mlflow.")}
            return UserError(f"no run in {uri} has a tag {tag!r}; {_nearest(tag, names)}")
        if value not in values:
            return UserError(f"no run in {uri} has {tag}={value}; {_nearest(value, values)}")
    return UserError(f"no run in {uri} has all of {word}; leave one of the tags out")


def _unknown(uri: str, word: str) -> UserError:
    rows = find_runs_anywhere(uri)
    if not rows:
        return UserError(f"there are no runs in {uri}; name another store with --tracking_uri or MLFLOW_TRACKING_URI")
    hint = _nearest(word, {row.name for row in rows} | {row.run_id for row in rows if _ID.fullmatch(word)})
    return UserError(
        f"no run in {uri} has the name {word!r} or an id that begins so; {hint}. To select several runs, write "
        "TAG=VALUE, such as sweep=quickstart"
    )


def _nearest(word: str, names: Iterable[str]) -> str:
    known = sorted(names)
    close = difflib.get_close_matches(word, known, n=3) or known[:3]
    more = ", ..." if len(known) > len(close) else ""
    return f"there are {', '.join(close)}{more}" if close else "there are none"
