"""The arms of a replay: one without a change, and one for each change."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.shipped_files import find_config

UNCHANGED, FROZEN = "unchanged", "frozen routing"
_KEY = re.compile(r"(?:data|model|trainer)(?:\.\w+)+\+?|seed_everything")


class Arm(NamedTuple):
    """One replay."""

    name: str
    words: tuple[str, ...]
    """Options of `moevlm fit`."""


def read_change(text: str) -> Arm:
    """Return the arm of a change: KEY=VALUE, or a YAML file of options.

    Raises:
        UserError: it is neither.
    """
    key, equals, value = text.partition("=")
    if equals and _KEY.fullmatch(key):
        return Arm(text, (f"--{key}={value}",))
    if Path(text).suffix in (".yaml", ".yml"):
        return Arm(text, ("-c", str(find_config(Path(text)).absolute())))
    raise UserError(
        f"--with {text}: write KEY=VALUE with a key of data, model or trainer, such as model.gradient.clip_norm=1.0, "
        "or give a YAML file of options"
    )


def make_arms(changes: Sequence[str], frozen: Arm | None) -> list[Arm]:
    """Return all arms, the unchanged one first.

    Raises:
        UserError: a change that is neither KEY=VALUE nor a file, or that is given twice.
    """
    arms = [Arm(UNCHANGED, ()), *map(read_change, changes), *([] if frozen is None else [frozen])]
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--with {twice} is given twice: give each change once")
    return arms
