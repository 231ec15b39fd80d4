"""Reads samples of tars through the webdataset library's stages: tars, members, samples, shuffle, decode, map.

Its own opener would start programs for addresses; here the storage opens them. What fails becomes a loss, which the
reader counts or ends the run with. `decode` decodes images alone: the library would also unpickle members.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.faults import Cause, DataFault, Lost, lost_sample_error
from lightning_moevlm.data.format.shard_reader import RawSample
from lightning_moevlm.data.plain.options import WebDatasetOptions
from lightning_moevlm.data.storage.find_tars import FoundTar

_REMEDY = "leave the tar out of data.urls"
_SHOWN = 6
_TAR_BLOCK = 512
_GZIP = b"\x1f\x8b"


def read_tars(
    tars: Sequence[FoundTar], options: WebDatasetOptions, wanted: frozenset[str], tolerant: bool
) -> Iterator[RawSample | Lost]:
    """Yield the samples of tars in their order, and what is lost.

    Args:
        tars: read one after the other.
        options: of the pipeline.
        wanted: members that a batch is made of: image, txt, json, cls.
        tolerant: whether losses of whole tars and in stages are yielded; otherwise the first ends it.

    Raises:
        UserError: a loss without tolerance, or very many in a row.
    """
    from webdataset.shardlists import SimpleShardList

    yield from _run(tars, SimpleShardList([str(index) for index in range(len(tars))]), [], options, wanted, 1, tolerant)


def draw_tars(
    tars: Sequence[FoundTar],
    options: WebDatasetOptions,
    wanted: frozenset[str],
    per_tar: int,
    tolerant: bool,
    shuffle_buffer: int,
    seed: int,
) -> Iterator[RawSample | Lost]:
    """Yield samples without end: tars are drawn with replacement, samples shuffled in a buffer. seed: of both.

    per_tar: samples that count as lost with a whole tar.
    """
    from webdataset.filters import shuffle
    from webdataset.shardlists import ResampledShards

    names = [str(index) for index in range(len(tars))]
    drawn = ResampledShards(names, seed=seed, worker_seed=lambda: seed, deterministic=True)
    yield from _run(tars, drawn, [shuffle(shuffle_buffer, rng=Random(seed))], options, wanted, per_tar, tolerant)


class _Losses:
    """What the library's stages have failed at since the last sample."""

    def __init__(self, num_tars: int, tolerant: bool) -> None:
        self._found: list[Lost] = []
        self._tolerant = tolerant
        self._most = {True: 2 * num_tars + 10, False: 10_000}  # of whole tars, and of samples
        self._count = {True: 0, False: 0}

    def add(self, cause: Cause, message: str, num_samples: int = 1, is_tar: bool = False) -> None:
        """Keep a loss.

        Raises:
            UserError: without tolerance, or if so many have failed in a row that no sample may come.
        """
        lost = Lost(num_samples, cause, message)
        if not self._tolerant:
            raise lost_sample_error(lost)
        self._found.append(lost)
        self._count[is_tar] += 1
        if self._count[is_tar] > self._most[is_tar]:
            raise UserError(
                f"no sample comes from data.urls: {self._count[is_tar]} losses in a row, the last: {message}"
            )

    def taken(self) -> list[Lost]:
        """Return them, and forget them."""
        found, self._found = self._found, []
        self._count = {True: 0, False: 0}
        return found


def _run(
    tars: Sequence[FoundTar],
    order: Iterable[dict[str, str]],
    stages: list[Any],
    options: WebDatasetOptions,
    wanted: frozenset[str],
    per_tar: int,
    tolerant: bool,
) -> Iterator[RawSample | Lost]:
    from webdataset.filters import decode, map
    from webdataset.pipeline import DataPipeline
    from webdataset.tariterators import group_by_keys, tar_file_expander

    losses = _Losses(len(tars), tolerant)

    def handle_tar(error: Exception) -> bool:
        place = next((str(each) for each in reversed(error.args) if isinstance(each, str)), "a tar")
        if isinstance(error, DataFault):
            losses.add(error.cause, str(error.args[0]), per_tar, is_tar=True)
        else:
            said = " ".join(str(error.args[0] if error.args else error).split()).partition(" @ ")[0]
            losses.add("shard_corrupt", f"{place} is truncated or not a tar ({said}); {_REMEDY}", per_tar, is_tar=True)
        return True

    def handle_group(error: Exception) -> bool:
        losses.add("duplicate_key", f"{error.args[0] if error.args else error}; pack the tar again")
        return True

    def handle_decode(error: Exception) -> bool:
        where = f"{getattr(error, 'key', '')} in {getattr(error, 'url', '')}"
        losses.add("image_undecodable", f"the image of {where} cannot be decoded ({error.__cause__ or error})")
        return True

    def handle_map(error: Exception) -> bool:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        losses.add(
            "map_failed", f"data.webdataset.map failed for a sample ({said}); make it return None for such samples"
        )
        return True

    def expand(source: Iterable[Any]) -> Iterator[Any]:
        yield from tar_file_expander(_open(source, tars, handle_tar), handler=handle_tar, select_files=_is_member)

    pipeline = [
        order,
        expand,
        lambda files: group_by_keys(files, handler=handle_group),
        *stages,
        *([] if options.decode is None else [decode(
            options.decode, pre=[], post=[], only=list(options.images), handler=handle_decode
        )]),
        *([] if options.map is None else [map(options.map, handler=handle_map)]),
    ]  # fmt: skip
    for sample in DataPipeline(*pipeline):
        yield from losses.taken()
        yield _to_raw(sample, wanted, options)
    yield from losses.taken()


def _open(
    source: Iterable[dict[str, str]], tars: Sequence[FoundTar], handler: Callable[[Exception], bool]
) -> Iterator[dict[str, Any]]:
    for entry in source:
        tar = tars[int(entry["url"])]
        try:
            stream = tar.storage.stream(tar.file)
        except DataFault as fault:
            handler(fault)
            continue
        with stream:
            watched = _Watched(stream)
            yield {"url": tar.place, "stream": watched}
            if watched.ended_early:
                text = f"{tar.place} is truncated: it ends without the mark that ends a tar; {_REMEDY}"
                handler(DataFault("shard_truncated", text))


class _Watched:
    """A stream that knows whether a tar ended before its end: the library takes a truncated tar for a whole one."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._begin = b""
        self._last = b""
        self._is_read = False

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._begin = self._begin or data[: len(_GZIP)]
        self._is_read = self._is_read or len(data) < size
        self._last = (self._last + data)[-_TAR_BLOCK:]
        return data

    @property
    def ended_early(self) -> bool:
        return self._is_read and bool(self._begin) and self._begin != _GZIP and self._last != bytes(_TAR_BLOCK)


def _is_member(name: str) -> bool:
    return not name.rpartition("/")[2].startswith(".")  # macOS puts such files into archives


def _to_raw(sample: Any, wanted: frozenset[str], options: WebDatasetOptions) -> RawSample | Lost:
    if not isinstance(sample, dict):
        what = type(sample).__name__
        return Lost(1, "map_failed", f"data.webdataset.map returned a {what}: return the sample as a dict, or None")
    key, place = str(sample.get("__key__", "")), str(sample.get("__url__", "data.urls"))
    members: dict[str, bytes] = {}
    for member in wanted:
        names = options.names_of(member)
        value = next((sample[name] for name in names if name in sample), None)
        if value is None:
            there = [name for name in sample if not re.match("__", name)]
            only = f", only .{', .'.join(there[:_SHOWN])}" if there else ""
            option = "image" if member == "image" else "caption or caption_field"
            return Lost(
                1, "member_missing",
                f"{key} in {place} has no .{' or .'.join(names)}{only}; name the members in data.webdataset.{option}",
            )  # fmt: skip
        try:
            members[member] = _to_bytes(value)
        except (TypeError, ValueError, OSError) as error:
            return Lost(
                1, "map_failed", f"{key} in {place}: .{names[0]} cannot be used after data.webdataset.map ({error})"
            )
    return RawSample(key, place, members)


def _to_bytes(value: Any) -> bytes:
    """Return a member as it may stand in a tar, of what stages have made of it; images stay lossless."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, Tensor):
        value = value.movedim(0, -1).numpy() if value.ndim == 3 else value.numpy()
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8:
            raise TypeError(f"pixels are {value.dtype}: give uint8")
        value = Image.fromarray(value)
    if isinstance(value, Image.Image):
        held = io.BytesIO()
        value.save(held, "BMP" if value.mode == "RGB" else "PNG")
        return held.getvalue()
    return json.dumps(value).encode()
