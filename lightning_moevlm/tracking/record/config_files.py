"""Finds the configuration files that a command line names.

Whether the parsed configuration keeps their names depends on the parser's mode.
"""

from collections.abc import Sequence
from pathlib import Path

from lightning_moevlm.common.shipped_files import find_file

_OPTIONS = ("-c", "--config")


def config_sources(argv: Sequence[str]) -> tuple[Path, ...]:
    """Return the files given with `-c X`, `--config X` or `--config=X`, in order.

    A path that does not exist from here is looked up among those that the package ships. Others are left out:
    jsonargparse also takes a configuration written into the option itself.
    """
    pairs = zip(("", *argv), argv, strict=False)
    named = [word.removeprefix("--config=") for before, word in pairs if names_config(before, word)]
    found = (find_file(Path(name)) for name in named)
    return tuple(path for path in found if path is not None)


def names_config(before: str, word: str) -> bool:
    """Return whether a word, which follows another, names a configuration file, also as `--config=FILE`."""
    is_named = before in _OPTIONS or word.startswith("--config=")
    name = word.removeprefix("--config=")
    # a configuration itself may be too long to be looked up as a name
    return is_named and "\n" not in name and not name.lstrip().startswith("{")
