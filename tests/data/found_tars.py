"""Tars of other programs, with any names in any order, and both ways to make a set of them."""

import io
import json
import tarfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.manifest import SPLITS
from lightning_moevlm.data.write.convert.convert import Converted, ConvertOptions, Licence
from lightning_moevlm.data.write.convert.keep_tars import keep_tars
from lightning_moevlm.data.write.convert.sources.img2dataset import Img2datasetSource
from lightning_moevlm.data.write.convert.sources.member_names import DEFAULT_NAMES, MemberNames
from tests.data.sources import caption, make_image, write_set

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


LICENCE = Licence("CC BY 4.0", "", "")


def keep(folder: Path, out: Path, max_bad: int = 0, names: MemberNames = DEFAULT_NAMES) -> Converted:
    return keep_tars(folder, "found", out, LICENCE, 400, ConvertOptions(max_bad, 1, False), names)


def write_anew(folder: Path, out: Path, max_bad: int = 0, names: MemberNames = DEFAULT_NAMES) -> Converted:
    return write_set(Img2datasetSource(folder, "found", names), out, max_bad, licence=LICENCE)


BOTH = pytest.mark.parametrize("convert_it", [keep, write_anew])


def num_samples(converted: Converted) -> int:
    return sum(converted.manifest.num_samples(split) for split in SPLITS)


def flat(*samples: Files) -> list[tuple[str, bytes]]:
    return list(chain.from_iterable(samples))


def three_tars(per_tar: int = 20) -> list[Files]:
    return [flat(*(sample(i, f"{i:04d}") for i in range(t * per_tar, (t + 1) * per_tar))) for t in range(3)]


def read_set(root: Path, max_lost_fraction: float = 0.0) -> ShardDataModule:
    return ShardDataModule(str(root), 4, 16, 16, 400, num_streams=2, max_lost_fraction=max_lost_fraction)
