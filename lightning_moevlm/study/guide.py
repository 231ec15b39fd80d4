"""What a study file can say, told from its keys: rows for `moevlm describe`, and the file of `moevlm sweep new`."""

from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from lightning_moevlm.study.declare.design_keys import DESIGNS, DesignPage
from lightning_moevlm.study.declare.schema import Block, Key
from lightning_moevlm.study.declare.study_keys import BLOCKS, STUDY_FILE

_COLUMNS = 110
ABOUT = """\
A study file declares what is compared, how long each run is, and by which rule a difference counts.

A run's configuration is, later ones winning: the files of `base`, `all_arms`, the arm's own changes, and last what the
study sets itself (seed, budget, logger, output folder). A run's digest is of the whole result, so that it does not
matter which of them says a value."""


@dataclass(frozen=True)
class KeyRow:
    """One key for people. key: dotted, with NAME for a name of the author's choice."""

    key: str
    type: str
    default: str
    meaning: str
    example: str


def study_rows() -> list[KeyRow]:
    """Return a row per key of a study file."""
    return [row for block in BLOCKS for row in key_rows(block)]


def key_rows(block: Block) -> list[KeyRow]:
    """Return a row per key of a mapping."""
    start = f"{block.path}." if block.path else ""
    return [
        KeyRow(f"{start}{key.name}", key.value.text, key.default_text, key.meaning, key.example.strip())
        for key in block.keys
    ]


def design_text(page: DesignPage) -> str:
    """Return what a design is, in lines."""
    return f"design: {page.kind}\n\n{page.arms}\n\nTakes {page.takes}.\n\nExample:\n\n    design: {page.example}"


def designs() -> tuple[DesignPage, ...]:
    """Return every design."""
    return tuple(DESIGNS.values())


def skeleton(name: str) -> str:
    """Return a study file that plans as it is, with every key explained and what is optional commented out.

    name: of the file, for the commands that its head tells.
    """
    parts = [
        f"# Show what would run: moevlm sweep plan {name}\n"
        f"# Run it, then report:  moevlm sweep run {name}\n"
        "# More on keys: moevlm describe study, moevlm list designs, moevlm list metrics\n"
        "# A line that begins with # and no space is an optional key: remove the # to set it.\n"
    ]
    blocks = {block.path.split(".")[0].removesuffix("[]"): block for block in BLOCKS}
    for key in STUDY_FILE.keys:
        lines = [*_comment(_describe_key(key)), *_comment_block(blocks.get(key.name))]
        text = f"{key.name}: {key.example}".replace(": \n", ":\n")
        is_set = key.is_required or key.name == "arms"
        lines += text.splitlines() if is_set else [f"#{line}" for line in text.splitlines()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _comment_block(block: Block | None) -> list[str]:
    """Return comments on the keys of the mapping that a key takes."""
    if block is None:
        return []
    return [line for key in block.keys for line in _comment(f"{key.name}: {_describe_key(key)}", "  ")]


def _describe_key(key: Key[Any]) -> str:
    default = "Required." if key.is_required else f"Default: {key.default_text}."
    return f"{key.meaning} Takes: {key.value.text}. {default}"


def _comment(text: str, indent: str = "") -> Iterable[str]:
    return [f"# {indent}{line}" for line in wrap(text, _COLUMNS)]
