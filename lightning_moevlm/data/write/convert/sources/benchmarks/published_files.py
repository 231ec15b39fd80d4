"""Finds the files of a benchmark in its folder, and gives each a split of the set.

A benchmark whose answers are published for two files alone is judged on the second, as the literature does. A tenth of
the images of the first, by hash, is then held out for validation.
"""

from collections.abc import Mapping
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import Scalar, Split, file_sha256
from lightning_moevlm.data.write.shard_writer import choose_split

Files = dict[Split, Path]


def find_files(folder: Path, names: Mapping[Split, str]) -> Files:
    """Return a file for each split. names: glob patterns of file names, by split.

    Raises:
        UserError: one is missing, or a pattern fits several.
    """
    if not folder.is_dir():
        raise UserError(
            f"folder {folder}: there is no such folder; give the one that holds {', '.join(names.values())}"
        )
    found: Files = {}
    for split, name in names.items():
        fitting = sorted(folder.glob(name))
        if len(fitting) != 1:
            raise UserError(
                f"{folder} has {len(fitting) or 'no'} files {name} for the {split} split; it should hold one each of "
                f"{', '.join(names.values())}"
            )
        found[split] = fitting[0]
    return found


def hashes(files: Files, what: str = "table") -> dict[str, Scalar]:
    """Return the hash of every file, as arguments of a source."""
    return {f"{what}_{split}": file_sha256(path) for split, path in files.items()}


def split_of(file_split: Split, files: Mapping[Split, object], image: str) -> Split:
    """Return the split of an image, which may be held out of the training file. image: its name or number."""
    if file_split == "train" and "val" not in files:
        return "val" if choose_split(image) == "val" else "train"
    return file_split
