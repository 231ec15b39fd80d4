"""Follows the experts of a run over its checkpoints, and compares them with those of other runs, on one probe."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_moevlm.atlas.causal.intervene import sparse_layers
from lightning_moevlm.atlas.history.matching import Agreement, match_experts
from lightning_moevlm.atlas.history.settling import Chosen, Settling, settle
from lightning_moevlm.atlas.labels.label import Label
from lightning_moevlm.atlas.labels.label_tokens import LabelReader
from lightning_moevlm.atlas.probe.probe_set import ProbeSet
from lightning_moevlm.atlas.routing.route import route
from lightning_moevlm.atlas.routing.trace import Trace, TracedLayer, TraceWriter
from lightning_moevlm.atlas.statistics.specialisation import BLOCK, specialise
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.objectives import Objective

FOLLOWED = ("modality", "category", "object", "object colour", "question kind", "class", "word class", "position")
"""Labels, by their last part, whose NMI is followed; a word or a colour of a patch needs no expert that knows it."""
_DRAWS = 19  # of null models: they give the mean by chance, and no p
_MOST_TOKENS = 20_000  # of a comparison of two runs; a draw of its null costs E^2 products a token


class Place(NamedTuple):
    """A layer and the modality of its tokens."""

    layer: str
    modality: str


class Specialised(NamedTuple):
    """NMI of the experts of a layer and a label at one checkpoint."""

    step: int
    nmi: float
    by_chance: float


@dataclass(frozen=True)
class History:
    """The experts of a run over its checkpoints."""

    steps: tuple[int, ...]
    settling: dict[Place, Settling]
    specialisation: dict[tuple[str, str], tuple[Specialised, ...]]
    """By layer and name of the label."""


def follow(
    load: Callable[[Path], Backbone],
    checkpoints: Sequence[tuple[int, Path]],
    objective: Objective,
    probe: ProbeSet,
    folder: Path,
    batch_size: int = 32,
) -> History:
    """Route the probe by every checkpoint. One model is in memory at a time.

    Args:
        load: returns the model of a checkpoint.
        checkpoints: optimiser steps and files; the one with most steps is the end.
        objective: of the training.
        probe: the samples.
        folder: for temporary files.
        batch_size: samples of a forward pass.

    Raises:
        UserError: fewer than two checkpoints of different steps, or a model without experts for these samples.
    """
    by_step = dict(sorted(checkpoints))
    refuse_short_course(by_step)
    with _Traces(folder) as traces:
        reader: LabelReader | None = None
        for step, file in track(by_step.items(), len(by_step), "routing by each checkpoint"):
            backbone = load(file)
            reader = reader or LabelReader(backbone, probe.tokenizer)
            traces.write(str(step), backbone, objective, probe, reader, batch_size)
        assert reader is not None
        steps, of_steps = tuple(by_step), [traces.read(str(step)) for step in by_step]
        patches = reader.grid**2
        settling = {
            place: settle(steps, blocks)
            for place, blocks in _places(of_steps, patches)
            if not _is_soft(of_steps, place)
        }
        labels = [label for label in reader.known() if label.name.rpartition("/")[2] in FOLLOWED]
        specialisation = {
            (layer.layer, label.name): tuple(found)
            for layer in of_steps[-1].layers
            for label in labels
            if (found := [*_specialise(steps, of_steps, layer, label, reader, probe.seed)])
        }
    return History(steps, settling, specialisation)


def refuse_short_course(steps: Iterable[int]) -> None:
    """Refuse fewer than two checkpoints of different steps, with a UserError."""
    number = len(set(steps))
    if number < 2:
        raise UserError(
            f"a history needs two checkpoints of different steps, and the run has {number}: train with "
            "-c conf/callbacks/keep_checkpoints.yaml"
        )


def compare_runs(
    first: Backbone, second: Backbone, objectives: tuple[Objective, Objective], probe: ProbeSet, folder: Path,
    batch_size: int = 32, draws: int = 199,
) -> dict[Place, Agreement]:  # fmt: skip
    """Match the experts of two runs in every layer that both have.

    Args:
        first: the model of one run.
        second: that of the other, of the same sizes.
        objectives: of their trainings.
        probe: the samples.
        folder: for temporary files.
        batch_size: samples of a forward pass.
        draws: of each null.

    Raises:
        UserError: models that cut samples into other tokens, or without a layer in common.
    """
    refuse_other_family(first, second)
    reader = LabelReader(first, probe.tokenizer)
    with _Traces(folder) as traces:
        for name, backbone, objective in zip(("first", "second"), (first, second), objectives, strict=True):
            traces.write(name, backbone, objective, probe, reader, batch_size)
        both = [traces.read("first"), traces.read("second")]
        found = {
            place: _match(both, place, reader.grid**2, draws, probe.seed)
            for place, _ in _places(both, reader.grid**2)
            if not _is_soft(both, place)
        }
    if not found:
        raise UserError(
            "no layer of experts of both models sees a token of the probe: choose other data or a larger one"
        )
    return found


def refuse_other_family(first: Backbone, second: Backbone) -> None:
    """Refuse models that cut samples into other tokens, or without a layer of experts in common, with a UserError."""
    if _sizes(first) != _sizes(second):
        raise UserError(
            f"runs are compared on the same tokens, and their models cut samples otherwise: {_sizes(first)} and "
            f"{_sizes(second)}; compare runs of one configuration with other seeds"
        )
    layers, others = sparse_layers(first), sparse_layers(second)
    if not any(name in others and others[name].num_experts == layer.num_experts for name, layer in layers.items()):
        raise UserError(
            f"the two models have no layer of experts in common, {', '.join(layers) or 'none'} and "
            f"{', '.join(others) or 'none'}: compare runs of one configuration with other seeds"
        )


class _Traces:
    """Traces in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self._parent = folder
        self._stack = ExitStack()

    def __enter__(self) -> "_Traces":
        self._parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(dir=self._parent, prefix=".history-")))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(
        self, name: str, backbone: Backbone, objective: Objective, probe: ProbeSet, reader: LabelReader, size: int
    ) -> None:
        with TraceWriter(self._folder / name) as writer:
            for routed in route(backbone, objective, probe, reader, size):
                writer.add(routed)

    def read(self, name: str) -> Trace:
        return Trace(self._folder / name)


def _places(traces: Sequence[Trace], patches: int) -> Iterator[tuple[Place, Iterable[Sequence[Chosen]]]]:
    """Yield the layers and modalities that all traces have, with the choices of their tokens block by block."""
    common = [layer for layer in traces[-1].layers if all(layer in trace.layers for trace in traces)]
    for layer in common:
        for modality in Modality:
            if any(len(block[0]) for block in _blocks(traces, layer, modality, patches)):
                yield Place(layer.layer, modality.label), _blocks(traces, layer, modality, patches)


def _blocks(
    traces: Sequence[Trace], layer: TracedLayer, modality: Modality, patches: int
) -> Iterator[tuple[Chosen, ...]]:
    for rows in traces[-1].blocks(BLOCK):
        own_BS = _own(traces, layer, modality, patches, rows)
        yield tuple(trace.chosen(layer, rows)[own_BS] > 0 for trace in traces)


def _own(
    traces: Sequence[Trace], layer: TracedLayer, modality: Modality, patches: int, rows: slice
) -> NDArray[np.bool_]:
    """Return the tokens of a modality that the layer saw in all traces, (rows, S)."""
    seen_BS = np.logical_and.reduce([trace.seen(layer, rows) for trace in traces])
    is_image_S = np.arange(seen_BS.shape[1]) < patches
    own_BS: NDArray[np.bool_] = seen_BS & (is_image_S if modality == Modality.IMAGE else ~is_image_S)
    return own_BS


def _is_soft(traces: Sequence[Trace], place: Place) -> bool:
    return any(layer.is_soft for trace in traces for layer in trace.layers if layer.layer == place.layer)


def _specialise(
    steps: Sequence[int], traces: Sequence[Trace], layer: TracedLayer, label: Label, reader: LabelReader, seed: int
) -> Iterator[Specialised]:
    names = reader.values[label.name].names
    for step, trace in zip(steps, traces, strict=True):
        found = specialise(trace, layer, label, names, _DRAWS, seed)
        if found is not None:
            yield Specialised(step, found.nmi, found.nmi_by_chance)


def _match(traces: Sequence[Trace], place: Place, patches: int, draws: int, seed: int) -> Agreement:
    layer = next(each for each in traces[0].layers if each.layer == place.layer)
    modality = Modality[place.modality.upper()]
    every = slice(0, traces[0].num_samples)
    num_tokens = sum(int(_own(traces, layer, modality, patches, rows).sum()) for rows in traces[0].blocks(BLOCK))
    keep = min(1.0, _MOST_TOKENS / max(1, num_tokens))
    is_kept_N = np.random.default_rng(seed).random(every.stop) < keep
    parts = []
    for rows in traces[0].blocks(BLOCK):
        own_BS = _own(traces, layer, modality, patches, rows) & is_kept_N[rows, None]
        parts.append((*(trace.chosen(layer, rows)[own_BS] > 0 for trace in traces), np.nonzero(own_BS)[1]))
    first_TE, second_TE, position_T = (np.concatenate(each) for each in zip(*parts, strict=True))
    return match_experts(first_TE, second_TE, position_T, draws, seed)


def _sizes(backbone: Backbone) -> dict[str, int]:
    spec = backbone.spec
    return {name: getattr(spec, name) for name in ("image_size", "patch_size", "vocab_size", "max_text_len")}
