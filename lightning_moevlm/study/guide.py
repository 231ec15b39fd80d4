"""Describes a study file by its keys: rows for `moevlm describe`, and the file of `moevlm sweep new`."""

from collections.abc import Iterable
from textwrap import wrap

from lightning_moevlm.study.declare.comparison import Solve
from lightning_moevlm.study.declare.decode import KeyRow, Record, describe_keys
from lightning_moevlm.study.declare.designs.design_keys import DESIGNS, DesignPage
from lightning_moevlm.study.declare.study_keys import RECORDS, StudyFile

_COLUMNS = 110
ABOUT = """\
A study file declares the arms to compare, the length of each run, and the rule by which a difference counts.

A run's configuration is the files of `base`, then `all_arms`, then the arm's own changes, then the keys that the study
sets itself (seed, budget, logger, output folder); later ones win. A run's digest covers the result, so it does not
matter which of them sets a value."""


def study_rows() -> list[KeyRow]:
    """Return a row per key of a study file."""
    return [row for path, record in RECORDS.items() for row in describe_keys(record, path)]


def design_text(page: DesignPage) -> str:
    """Return the description of a design, in lines."""
    return f"design: {page.kind}\n\n{page.arms}\n\nTakes {page.takes}.\n\nExample:\n\n    design: {page.example}"


def designs() -> tuple[DesignPage, ...]:
    """Return every design."""
    return tuple(DESIGNS.values())


def skeleton(name: str) -> str:
    """Return a study file that plans as it is, with every key explained and optional keys commented out.

    name: Of the file, for the commands in its head.
    """
    parts = [
        f"# Show what would run: moevlm sweep plan {name}\n"
        f"# Run it, then report:  moevlm sweep run {name}\n"
        "# More on keys: moevlm describe study, moevlm list designs, moevlm list metrics\n"
        "# A line that begins with # and no space is an optional key: remove the # to set it.\n"
    ]
    records = {path.split(".")[0].removesuffix("[]"): record for path, record in RECORDS.items() if record is not Solve}
    for key in describe_keys(StudyFile):
        lines = [*_comment(_describe_key(key)), *_comment_keys(records.get(key.key))]
        text = f"{key.key}:\n  {key.example}" if "\n" in key.example else f"{key.key}: {key.example}"
        is_set = key.default == "required" or key.key == "arms"
        lines += text.splitlines() if is_set else [f"#{line}" for line in text.splitlines()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _comment_keys(record: type[Record] | None) -> list[str]:
    """Return comments on the keys of the mapping that a key takes."""
    if record is None:
        return []
    return [line for key in describe_keys(record) for line in _comment(f"{key.key}: {_describe_key(key)}", "  ")]


def _describe_key(key: KeyRow) -> str:
    default = "Required." if key.default == "required" else f"Default: {key.default}."
    return f"{key.meaning} Takes: {key.type}. {default}"


def _comment(text: str, indent: str = "") -> Iterable[str]:
    return [f"# {indent}{line}" for line in wrap(text, _COLUMNS)]
