"""The configuration files that a command line names, read from its words.

The parsed configuration does not tell: whether it keeps their names depends on the parser's mode.
"""

from collections.abc import Sequence
from pathlib import Path

from lightning_moevlm.shipped import find_file

_OPTIONS = ("-c", "--config")


def config_sources(argv: Sequence[str]) -> tuple[Path, ...]:
    """Return the files given with `-c X`, `--config X` or `--config=X`, in order.

    A path that does not exist from here is looked for among those that the package ships. What is no file at all
    is left out: jsonargparse also takes a configuration written into the option itself.
    """
    named: list[str] = []
    follows_option = False
    for word in argv:
        if follows_option:
            named.append(word)
        elif word.startswith("--config="):
            named.append(word.removeprefix("--config="))
        follows_option = not follows_option and word in _OPTIONS
    found = (_file(name) for name in named)
    return tuple(path for path in found if path is not None)


def _file(name: str) -> Path | None:
    if "\n" in name or name.lstrip().startswith("{"):
        return None  # a configuration itself, which may be too long to be looked up as a name
    return find_file(Path(name))
