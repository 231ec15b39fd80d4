"""What worker processes do: look at a stretch of pictures, or write one shard.

Both are functions of their task alone, so it does not matter who does which, when, or how often.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import ShardEntry, file_sha256
from lightning_moevlm.data.write.convert.picture import Seen, Wish, look_at, read_picture, stored
from lightning_moevlm.data.write.convert.sources.row_source import BadCause, PictureAt, RowError
from lightning_moevlm.data.write.shard_writer import add_sample, open_shard


class Fault(NamedTuple):
    """Why a picture cannot be used; a `RowError` as data."""

    cause: BadCause
    message: str


class LookTask(NamedTuple):
    """Pictures to look at, in the folder that none may leave."""

    folder: Path
    pictures: tuple[PictureAt, ...]
    wish: Wish


class Planned(NamedTuple):
    """A sample with its place in a shard. sha256: of the picture's bytes when it was looked at, "" without one."""

    key: str
    place: str
    picture: PictureAt | None
    sha256: str
    caption: str | None
    annotation: str | None


class ShardTask(NamedTuple):
    """A shard to write into `target`, from pictures in `folder`."""

    folder: Path
    target: Path
    samples: tuple[Planned, ...]
    wish: Wish


def look(task: LookTask) -> tuple[Seen | Fault, ...]:
    """Look at every picture."""
    return tuple(_look(task.folder, picture, task.wish) for picture in task.pictures)


def _look(folder: Path, picture: PictureAt, wish: Wish) -> Seen | Fault:
    try:
        return look_at(read_picture(folder, picture), wish)
    except RowError as fault:
        return Fault(fault.cause, fault.message)


def write_shard(task: ShardTask) -> ShardEntry:
    """Write one shard, whole or not at all.

    Raises:
        UserError: if a picture is not what it was when it was looked at, or cannot be stored.

    """
    unfinished = task.target.with_name(f".{task.target.name}.{os.getpid()}.unfinished")
    with open_shard(unfinished) as tar:
        for sample in task.samples:
            add_sample(tar, sample.key, _members(sample, task))
    entry = ShardEntry(task.target.name, len(task.samples), unfinished.stat().st_size, file_sha256(unfinished))
    unfinished.replace(task.target)
    return entry


def _picture(place: str, picture: PictureAt, sha256: str, task: ShardTask) -> bytes:
    try:
        data = read_picture(task.folder, picture)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RowError("image_undecodable", "it holds other bytes than a moment ago")
    except RowError as fault:
        raise UserError(
            f"{place}: the image has changed while the set was converted ({fault.message}); "
            "convert again when nothing writes to the folder any more"
        ) from None
    try:
        return stored(data, task.wish)
    except RowError as fault:  # found by another decoder than that which looked at it
        raise UserError(f"{place}: {fault.message}; fix or remove the image, and convert again") from None


def _members(sample: Planned, task: ShardTask) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    if sample.picture is not None:
        members[task.wish.image_format] = _picture(sample.place, sample.picture, sample.sha256, task)
    if sample.caption is not None:
        members["txt"] = sample.caption.encode("utf-8")
    if sample.annotation is not None:
        members["json"] = sample.annotation.encode("utf-8")
    return members
