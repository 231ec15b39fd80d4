"""Keeps labels and choices of all tokens of a probe on disk, so that memory does not grow with the probe.

The file is safetensors. Rows are samples, columns positions: patches first, then text.

    label/NAME     int16 (N, S)          code of the label's value, -1 where it says nothing
    unit/NULL      int32 (N, S)          what a null model exchanges, -1 where there is nothing
    source         int16 (N,)            number of the set
    seen/LAYER     bool (N, S)           tokens that the layer's router saw
    chosen/LAYER   uint8 (N, S, E / 8)   chosen experts, one bit each (numpy.packbits)
                   fp16 (N, S, E)        or, of soft slots, the share of each expert
"""

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_moevlm.atlas.labels.label import BY_NAME, Label, Null
from lightning_moevlm.atlas.routing.route import RoutedBatch

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "F16": np.dtype(np.float16),
}
_TYPES = {dtype: name for name, dtype in _DTYPES.items()}


class TracedLayer(NamedTuple):
    """A layer of a trace."""

    layer: str
    """Path in the backbone."""
    block: int
    num_experts: int
    is_soft: bool


class TraceWriter:
    """Writes a trace batch by batch; the file is there when the context ends without an error.

    Args:
        file: to write.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.layers: dict[str, TracedLayer] = {}
        self._num_rows = 0
        self._open: dict[str, IO[bytes]] = {}
        self._rows: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._sources: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TraceWriter":
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(dir=self.file.parent, prefix=".tracing-")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                self._join()

    def add(self, routed: RoutedBatch) -> None:
        """Append a batch."""
        labels = routed.labels
        for name, codes_BS in labels.codes.items():
            self._append(f"label/{name}", codes_BS.astype(np.int16))
        for null, units_BS in labels.units.items():
            self._append(f"unit/{null}", units_BS)
        source = self._sources.setdefault(routed.probe.source, len(self._sources))
        self._append("source", np.full(len(labels.valid_BS), source, np.int16))
        for each in routed.layers:
            chosen_BSE = each.chosen_BSE.numpy()
            is_soft = bool(((chosen_BSE > 0) & (chosen_BSE < 1)).any())
            known = TracedLayer(each.layer, each.block, chosen_BSE.shape[-1], is_soft)
            known = self.layers.setdefault(each.layer, known)
            self._append(f"seen/{each.layer}", each.seen_BS.numpy())
            stored = chosen_BSE.astype(np.float16) if known.is_soft else np.packbits(chosen_BSE > 0, axis=-1)
            self._append(f"chosen/{each.layer}", stored)
        self._num_rows += len(labels.valid_BS)

    def _append(self, name: str, rows: NDArray[Any]) -> None:
        if name not in self._open:
            self._open[name] = self._stack.enter_context((self._folder / f"{len(self._open)}").open("w+b"))
            self._rows[name] = (rows.dtype, rows.shape[1:])
        stream = self._open[name]
        stream.seek(self._num_rows * _row_bytes(*self._rows[name]))  # samples that it lacks are zeros
        stream.write(np.ascontiguousarray(rows).tobytes())

    def _join(self) -> None:
        header: dict[str, Any] = {}
        place = 0
        for name, (dtype, shape) in self._rows.items():
            stop = place + self._num_rows * _row_bytes(dtype, shape)
            header[name] = {"dtype": _TYPES[dtype], "shape": [self._num_rows, *shape], "data_offsets": [place, stop]}
            place = stop
        layers = [each._asdict() for each in self.layers.values()]
        header["__metadata__"] = {"layers": json.dumps(layers), "sources": json.dumps(list(self._sources))}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        unfinished = self.file.with_name(f".{self.file.name}.unfinished")
        with unfinished.open("wb") as target:
            target.write(len(encoded).to_bytes(8, "little") + encoded)
            for name, stream in self._open.items():
                stream.truncate(self._num_rows * _row_bytes(*self._rows[name]))
                stream.seek(0)
                shutil.copyfileobj(stream, target)
        unfinished.replace(self.file)


class Trace:
    """A trace on disk; only the rows that are asked for are in memory."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        self._start = 8 + length
        about = header.pop("__metadata__")
        self._tensors: Mapping[str, Mapping[str, Any]] = header
        self.layers = tuple(sorted((TracedLayer(**each) for each in json.loads(about["layers"])), key=_by_block))
        self.sources: tuple[str, ...] = tuple(json.loads(about["sources"]))
        self.num_samples, self.length = header["unit/positions"]["shape"]

    def source_numbers(self) -> NDArray[np.int16]:
        """Return the number of the set of each sample, (N)."""
        return self._read("source", slice(0, self.num_samples))

    def labels(self) -> tuple[Label, ...]:
        """Return the labels, in their order."""
        return tuple(label for name, label in BY_NAME.items() if f"label/{name}" in self._tensors)

    def blocks(self, size: int) -> Iterator[slice]:
        """Yield consecutive rows of one source each, at most `size` of them."""
        source_N = self.source_numbers()
        edges = [0, *(np.flatnonzero(np.diff(source_N)) + 1).tolist(), self.num_samples]
        for first, last in itertools.pairwise(edges):
            for start in range(first, last, size):
                yield slice(start, min(start + size, last))

    def label(self, name: str, rows: slice) -> NDArray[np.int16]:
        """Return the codes of a label, (rows, S)."""
        return self._read(f"label/{name}", rows)

    def unit(self, null: Null, rows: slice) -> NDArray[np.int32]:
        """Return what a null model exchanges, (rows, S)."""
        return self._read(f"unit/{null}", rows)

    def seen(self, layer: TracedLayer, rows: slice) -> NDArray[np.bool_]:
        """Return which tokens a layer's router saw, (rows, S)."""
        return self._read(f"seen/{layer.layer}", rows)

    def chosen(self, layer: TracedLayer, rows: slice) -> NDArray[np.float32]:
        """Return the chosen experts, (rows, S, E): 1 for each, or the shares of soft slots."""
        stored = self._read(f"chosen/{layer.layer}", rows)
        if not layer.is_soft:
            stored = np.unpackbits(stored, axis=-1, count=layer.num_experts)
        return stored.astype(np.float32)

    def _read(self, name: str, rows: slice) -> NDArray[Any]:
        about = self._tensors[name]
        dtype, shape = _DTYPES[about["dtype"]], tuple(about["shape"][1:])
        per_row = _row_bytes(dtype, shape)
        offset = self._start + about["data_offsets"][0] + rows.start * per_row
        count = (rows.stop - rows.start) * (per_row // dtype.itemsize)
        return np.fromfile(self.file, dtype, count, offset=offset).reshape(-1, *shape)


def _row_bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return int(dtype.itemsize * np.prod(shape, dtype=np.int64))


def _by_block(layer: TracedLayer) -> tuple[int, str]:
    return layer.block, layer.layer
