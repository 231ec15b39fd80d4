"""A recording: the steps around a spike, a loss that is not finite, or a crash, in one file that can be mailed.

The file is safetensors: nothing in it is unpickled. `values` (K, V) holds K steps by V quantities, fp32; `is_known`
(K, V) says which were measured; `steps` (K) numbers the optimiser steps from 1. The header has the rest as JSON.

A quantity is named KIND/PLACE. Kinds and places:

    task_loss, total_loss           of the whole step                             no place
    loss, loss_weight               a term before its weight, and the weight      a term
    gradient_norm                   before clipping                               a layer
    update_norm                     of the change of the weights, from a part     a layer
                                    of them
    attention_logit, router_logit   the largest in the forward passes             a layer and a pass
    output_logit                    largest |logsumexp of the output logits|      a term
    expert_update                   change of an expert's weights, as a share of  a layer and an expert
                                    the median of its layer
    load                            share of the chosen pairs                     a layer, a pass and an expert
    learning_rate, loss_scale       in force in the step                          no place
    skipped                         1 if the step was not taken                   no place
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from lightning_moevlm.common.errors import UserError

FORMAT = "moevlm-recording/1"
FOLDER = "recordings"
"""Of a run's folder and of its artifacts."""
REPLAY_FOLDER, REPLAY_FILE = "replay", "steps.safetensors"
"""Of a replay: the recording of all of its steps."""


class Event(msgspec.Struct, frozen=True):
    """A reason to record."""

    step: int
    """Optimiser step, from 1."""
    kind: str
    """spike, not finite, frozen expert, skipped, rollback, diverged or exception."""
    detail: str = ""


class RecordedStep(NamedTuple):
    """One optimiser step."""

    step: int
    values: Mapping[str, float]
    """By quantity; those that were not measured are absent."""
    keys: Mapping[str, tuple[str, ...]]
    """Keys of the samples, by source, over micro-batches and ranks."""


class Recording(NamedTuple):
    """The last steps of a run, oldest first."""

    events: tuple[Event, ...]
    steps: tuple[RecordedStep, ...]
    about: Mapping[str, str] = {}
    """Facts of the run, such as `ranks`."""


class _Header(msgspec.Struct, frozen=True):
    events: tuple[Event, ...]
    names: tuple[str, ...]
    keys: tuple[dict[str, tuple[str, ...]], ...]
    about: dict[str, str]


def split_quantity(name: str) -> tuple[str, str]:
    """Return kind and place of a quantity; the place is "" for one of the whole step."""
    kind, _, place = name.partition("/")
    return kind, place


def write_recording(recording: Recording, file: Path) -> None:
    """Write a recording; a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    from safetensors.numpy import save

    names = tuple(dict.fromkeys(name for one in recording.steps for name in one.values))
    shape = (len(recording.steps), len(names))
    values, is_known = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
    place = {name: column for column, name in enumerate(names)}
    for row, one in enumerate(recording.steps):
        columns = [place[name] for name in one.values]
        with np.errstate(over="ignore"):  # a loss beyond fp32 is infinite
            values[row, columns] = np.asarray([*one.values.values()], np.float64)
        is_known[row, columns] = True
    keys = tuple({source: tuple(held) for source, held in one.keys.items()} for one in recording.steps)
    header = msgspec.json.encode(_Header(recording.events, names, keys, dict(recording.about)))
    tensors = {
        "values": values,
        "is_known": is_known,
        "steps": np.asarray([one.step for one in recording.steps], np.int64),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_bytes(save(tensors, {"format": FORMAT, "header": header.decode()}))
    unfinished.replace(file)


def read_recording(file: Path) -> Recording:
    """Read a recording.

    Raises:
        UserError: the file is missing, is not a recording, or is one of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{file} has the format {metadata.get('format')}: this version reads {FORMAT}; read it with the "
                    "version that wrote it"
                )
            tensors = {name: opened.get_tensor(name) for name in ("values", "is_known", "steps")}
        header = msgspec.json.decode(metadata["header"], type=_Header)
    except (OSError, SafetensorError, KeyError, msgspec.MsgspecError) as error:
        raise UserError(f"{file} is not a recording ({error}); give a file that a run has written") from error
    return Recording(header.events, tuple(_rows(header, **tensors)), header.about)


def _rows(
    header: _Header, values: NDArray[np.float32], is_known: NDArray[np.bool_], steps: NDArray[np.int64]
) -> Iterator[RecordedStep]:
    for step, row, known, keys in zip(steps.tolist(), values.tolist(), is_known.tolist(), header.keys, strict=True):
        found = {name: value for name, value, has in zip(header.names, row, known, strict=True) if has}
        yield RecordedStep(step, found, keys)


def recording_name(step: int) -> str:
    """Return the file name of the recording of an event in this step."""
    return f"step{step:08d}.safetensors"


def merge_keys(of_ranks: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, tuple[str, ...]]:
    """Return the keys of all micro-batches or ranks, by source."""
    merged: dict[str, tuple[str, ...]] = {}
    for keys in of_ranks:
        for source, held in keys.items():
            merged[source] = merged.get(source, ()) + tuple(held)
    return merged
