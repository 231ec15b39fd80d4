"""Runs in worker processes: inspects a chunk of images, or writes one shard.

Both depend on their task alone, so any process may run them, at any time, any number of times.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import ShardEntry, file_sha256
from lightning_moevlm.data.write.convert.shard_image import (
    ImageOptions,
    InspectedImage,
    encode_for_shard,
    inspect_image,
    read_image,
)
from lightning_moevlm.data.write.convert.sources.row_source import BadCause, ImageLocation, RowError
from lightning_moevlm.data.write.shard_writer import add_sample, open_shard


class Fault(NamedTuple):
    """The reason why an image cannot be used: a `RowError` as data."""

    cause: BadCause
    message: str


class InspectTask(NamedTuple):
    """Images to inspect, all within `folder`."""

    folder: Path
    images: tuple[ImageLocation, ...]
    image_options: ImageOptions


class PlannedImage(NamedTuple):
    """An image of a sample to write."""

    location: ImageLocation
    sha256: str  # of its bytes at inspection


class PlannedSample(NamedTuple):
    """A sample to write."""

    key: str
    place: str  # in the source, for messages
    images: tuple[PlannedImage, ...]  # none to two
    caption: str | None
    annotation: str | None


class ShardTask(NamedTuple):
    """A shard to write into `target`, from images in `folder`."""

    folder: Path
    target: Path
    samples: tuple[PlannedSample, ...]
    image_options: ImageOptions


def inspect_images(task: InspectTask) -> tuple[InspectedImage | Fault, ...]:
    """Inspect every image."""
    return tuple(_inspect(task.folder, image, task.image_options) for image in task.images)


def _inspect(folder: Path, image: ImageLocation, image_options: ImageOptions) -> InspectedImage | Fault:
    try:
        return inspect_image(read_image(folder, image), image_options)
    except RowError as fault:
        return Fault(fault.cause, fault.message)


def write_shard(task: ShardTask) -> ShardEntry:
    """Write one shard, whole or not at all.

    Raises:
        UserError: if an image has changed since its inspection, or cannot be stored.
    """
    unfinished = task.target.with_name(f".{task.target.name}.{os.getpid()}.unfinished")
    with open_shard(unfinished) as tar:
        for sample in task.samples:
            add_sample(tar, sample.key, _members(sample, task))
    entry = ShardEntry(task.target.name, len(task.samples), unfinished.stat().st_size, file_sha256(unfinished))
    unfinished.replace(task.target)
    return entry


def image_members(num_images: int, image_format: str) -> tuple[str, ...]:
    """Return the members of a sample's images, in their order."""
    return (image_format, f"right.{image_format}")[:num_images]


def _image(place: str, image: PlannedImage, task: ShardTask) -> bytes:
    try:
        data = read_image(task.folder, image.location)
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise RowError("image_undecodable", "it holds other bytes than a moment ago")
    except RowError as fault:
        raise UserError(
            f"{place}: the image has changed while the set was converted ({fault.message}); "
            "convert again when nothing writes to the folder"
        ) from None
    try:
        return encode_for_shard(data, task.image_options)
    except RowError as fault:  # encoding uses another decoder than inspection
        raise UserError(f"{place}: {fault.message}; fix or remove the image, and convert again") from None


def _members(sample: PlannedSample, task: ShardTask) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    names = image_members(len(sample.images), task.image_options.image_format)
    for name, image in zip(names, sample.images, strict=True):
        members[name] = _image(sample.place, image, task)
    if sample.caption is not None:
        members["txt"] = sample.caption.encode("utf-8")
    if sample.annotation is not None:
        members["json"] = sample.annotation.encode("utf-8")
    return members
