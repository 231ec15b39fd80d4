"""Tars as people have them: any names in any order, in folders that nobody made for this package."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tests.data.sources import caption, make_image

Files = Sequence[tuple[str, bytes]]


def write_tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(number: int, key: str, about: object = None) -> list[tuple[str, bytes]]:
    """An image and its caption, and a json member if there is something about them."""
    files = [(f"{key}.jpg", make_image(number)), (f"{key}.txt", caption(number).encode())]
    return files if about is None else [*files, (f"{key}.json", json.dumps(about).encode())]


def folder_of(folder: Path, *tars: Files) -> Path:
    for number, files in enumerate(tars):
        write_tar(folder / f"part-{number}.tar", files)
    return folder
