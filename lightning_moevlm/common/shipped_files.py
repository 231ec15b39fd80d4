"""Finds files that come with the package: configurations in conf/, studies in ablations/.

A wheel has the two folders inside the package; an editable install has them beside it, as the repository has.
"""

from collections.abc import Sequence
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.nearest_name import find_nearest

_FOLDERS = ("conf", "ablations")


def shipped_root(package: Path = Path(__file__).parents[1]) -> Path:
    """Return the folder of conf/ and ablations/."""
    return package if (package / "conf").is_dir() else package.parent


def find_file(path: Path, beside: Sequence[Path] = ()) -> Path | None:
    """Return the file, or the one of that name in the folders `beside`, or the shipped one; None if there is none.

    Shipped files are named by paths that begin with conf/ or ablations/.
    """
    places = [path, *(folder / path for folder in beside)]
    if path.parts and path.parts[0] in _FOLDERS:
        places.append(shipped_root() / path)
    return next((place for place in places if place.is_file()), None)


def find_folder(path: Path) -> Path | None:
    """Return the folder, or the shipped one of that name; None if there is none."""
    places = [path, shipped_root() / path] if path.parts and path.parts[0] in _FOLDERS else [path]
    return next((place for place in places if place.is_dir()), None)


def describe_missing_file(kind: str, path: Path, beside: Sequence[Path] = ()) -> UserError:
    """Return the refusal of a YAML file of a kind (such as "configuration file") that is missing, with the nearest."""
    root = shipped_root()
    names = [str(each) for each in path.parent.glob("*.yaml")]
    names += [each.relative_to(folder).as_posix() for folder in beside for each in folder.glob("*.yaml")]
    names += [each.relative_to(root).as_posix() for folder in _FOLDERS for each in (root / folder).rglob("*.yaml")]
    near = find_nearest(str(path), names) or find_nearest(path.name, names)
    meant = f"did you mean {near}? " if near else ""
    places = " and ".join(str(root / folder) for folder in _FOLDERS)
    return UserError(f"there is no {kind} {path}; {meant}the shipped ones are in {places}")


def find_config(path: Path) -> Path:
    """Return the file, or the one of that name that the package ships.

    Raises:
        UserError: neither exists; names the nearest one.
    """
    found = find_file(path)
    if found is None:
        raise describe_missing_file("configuration file", path)
    return found
