"""Makes the atlas of a model: one pass over the probe, then the statistics of every layer and label."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_moevlm.atlas.labels.label import Label
from lightning_moevlm.atlas.labels.label_tokens import LabelReader
from lightning_moevlm.atlas.labels.words import find_tagger
from lightning_moevlm.atlas.probe.probe_set import ProbeRecord, ProbeSet
from lightning_moevlm.atlas.routing.route import route
from lightning_moevlm.atlas.routing.trace import Trace, TracedLayer, TraceWriter
from lightning_moevlm.atlas.statistics.specialisation import Specialisation, specialise
from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.progress import track
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.objectives import Objective
from lightning_moevlm.study.statistics.paired_tests import holm

TRACE_FILE = "choices.safetensors"
ALPHA = 0.01
"""Chance of any false claim in an atlas."""


@dataclass(frozen=True)
class LabelOfLayer:
    """The statistics of a label in a layer."""

    layer: TracedLayer
    found: Specialisation
    adjusted_p: tuple[float, ...]
    """Of each expert, after Holm over all experts, layers and labels."""


@dataclass(frozen=True)
class Atlas:
    """What the experts of a model do on a probe."""

    probe: ProbeRecord
    tagger: str | None
    layers: tuple[TracedLayer, ...]
    labels: tuple[Label, ...]
    names: Mapping[str, tuple[str, ...]]
    """Values of each label, by their code in the trace."""
    results: tuple[LabelOfLayer, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return one record for each layer and label."""
        return [
            {
                "layer": each.layer.layer,
                "block": each.layer.block,
                "label": each.found.label.name,
                "title": each.found.label.title,
                "nmi": each.found.nmi,
                "nmi_by_chance": each.found.nmi_by_chance,
                "p": each.found.p,
                "experts": each.layer.num_experts,
                "specialised": sum(p <= ALPHA for p in each.adjusted_p),
            }
            for each in self.results
        ]


def make_atlas(
    backbone: Backbone, objective: Objective, probe: ProbeSet, folder: Path, draws: int = 999, batch_size: int = 32
) -> Atlas:
    """Observe a model on a probe, and test what its experts prefer.

    Args:
        backbone: the model.
        objective: of its training.
        probe: the samples.
        folder: where the choices of all tokens are kept.
        draws: of each null model.
        batch_size: samples of a forward pass.

    Raises:
        UserError: a model without experts for these samples, samples that cannot be read, or a folder that cannot be
            written.
    """
    tagger = find_tagger()
    reader = LabelReader(backbone, probe.tokenizer, tagger)
    with explain_write_errors(folder), TraceWriter(folder / TRACE_FILE) as writer:
        steps = -(-probe.num_samples // batch_size)
        for routed in track(route(backbone, objective, probe, reader, batch_size), steps, "routing the probe"):
            writer.add(routed)
    trace = Trace(folder / TRACE_FILE)
    labels = reader.known()
    pairs = [(layer, label) for layer in trace.layers for label in labels]
    tested = [
        (layer, specialise(trace, layer, label, reader.values[label.name].names, draws, probe.seed))
        for layer, label in track(pairs, len(pairs), "testing labels")
    ]
    found = [(layer, result) for layer, result in tested if result is not None]
    p_values = {
        f"{number}/{expert}": float(p)
        for number, (_, result) in enumerate(found)
        for expert, p in enumerate(result.p_E)
    }
    adjusted = holm(p_values)
    results = tuple(
        LabelOfLayer(layer, result, tuple(adjusted[f"{number}/{expert}"] or 0.0 for expert in range(layer.num_experts)))
        for number, (layer, result) in enumerate(found)
    )
    names = {label.name: reader.values[label.name].names for label in labels}
    return Atlas(probe.record, None if tagger is None else tagger.name, trace.layers, labels, names, results)
