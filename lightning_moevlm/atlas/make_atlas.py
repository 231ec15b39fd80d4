"""Makes the atlas of a model: one pass over the probe, then the statistics of every layer and label."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_moevlm.atlas.gallery.images import encode_images
from lightning_moevlm.atlas.gallery.top_tokens import TopTokenKeeper, TopTokens
from lightning_moevlm.atlas.labels.label import Label
from lightning_moevlm.atlas.labels.label_tokens import LabelReader
from lightning_moevlm.atlas.labels.words import find_tagger
from lightning_moevlm.atlas.probe.probe_set import ProbeRecord, ProbeSet
from lightning_moevlm.atlas.routing.confidence import ConfidenceMeter, LayerConfidence
from lightning_moevlm.atlas.routing.route import route
from lightning_moevlm.atlas.routing.trace import Trace, TracedLayer, TraceWriter
from lightning_moevlm.atlas.statistics.claims import ALPHA, Claim, adjust, claims_of
from lightning_moevlm.atlas.statistics.information import Floats
from lightning_moevlm.atlas.statistics.specialisation import Specialisation, specialise
from lightning_moevlm.atlas.statistics.together import count_together
from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.progress import track
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.objectives import Objective

TRACE_FILE = "choices.safetensors"


@dataclass(frozen=True)
class LayerAtlas:
    """What the experts of a layer do."""

    layer: TracedLayer
    results: tuple[Specialisation, ...]
    """One a label that the layer's tokens have."""
    adjusted: tuple[Floats, ...]
    """The p of each expert in each result, after Holm over the whole atlas."""
    confidence: LayerConfidence
    tops: tuple[TopTokens, ...]
    """By expert."""
    claims: tuple[tuple[Claim, ...], ...]
    """What each expert serves, the strongest first."""

    @property
    def load_E(self) -> Floats:
        """Share of the chosen pairs of each expert."""
        pairs_E = np.asarray(self.confidence.pairs_E)
        return np.asarray(pairs_E / max(pairs_E.sum(), 1e-20), np.float64)

    @property
    def crossover(self) -> float | None:
        """sum_e min(p(e | image), p(e | text)): 0 no expert is shared, 1 all are alike; None for one modality."""
        for each in self.results:
            if each.label.name == "modality":
                share_EV = each.counts_EV / each.counts_EV.sum(0)
                return float(share_EV.min(axis=1).sum())
        return None


@dataclass(frozen=True)
class Atlas:
    """What the experts of a model do on a probe."""

    probe: ProbeRecord
    tagger: str | None
    draws: int
    patches_of_side: int
    labels: tuple[Label, ...]
    names: Mapping[str, tuple[str, ...]]
    """Values of each label, by their code in the trace."""
    of_layers: tuple[LayerAtlas, ...]
    together: Mapping[tuple[int, int], Floats]
    """Tokens that two experts share, for each pair of layers."""
    images: Mapping[tuple[str, str], str]
    """Data addresses of the images of the galleries, by source and key."""

    @property
    def layers(self) -> tuple[TracedLayer, ...]:
        """The layers, in the order of the model."""
        return tuple(each.layer for each in self.of_layers)

    def rows(self) -> list[dict[str, Any]]:
        """Return one record for each layer and label."""
        return [
            {
                "layer": layer.layer.layer,
                "block": layer.layer.block,
                "label": each.label.name,
                "title": each.label.title,
                "nmi": each.nmi,
                "nmi_by_chance": each.nmi_by_chance,
                "p": each.p,
                "experts": layer.layer.num_experts,
                "specialised": int((p_E <= ALPHA).sum()),
            }
            for layer in self.of_layers
            for each, p_E in zip(layer.results, layer.adjusted, strict=True)
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
    confidence, tops = ConfidenceMeter(), TopTokenKeeper(reader.grid**2, probe.seed)
    with explain_write_errors(folder), TraceWriter(folder / TRACE_FILE) as writer:
        steps = -(-probe.num_samples // batch_size)
        for routed in track(route(backbone, objective, probe, reader, batch_size), steps, "routing the probe"):
            writer.add(routed)
            confidence.add(routed)
            tops.add(routed)
    trace = Trace(folder / TRACE_FILE)
    labels = reader.known()
    pairs = [(layer, label) for layer in trace.layers for label in labels]
    tested = {
        (layer, label): specialise(trace, layer, label, reader.values[label.name].names, draws, probe.seed)
        for layer, label in track(pairs, len(pairs), "testing labels")
    }
    found = {place: result for place, result in tested.items() if result is not None}
    adjusted = dict(zip(found, adjust([*found.values()]), strict=True))
    layers = []
    for layer in trace.layers:
        own = [place for place in found if place[0] == layer]
        results, p_values = tuple(found[place] for place in own), tuple(adjusted[place] for place in own)
        experts, sure = range(layer.num_experts), confidence.of_layer(layer.layer)
        claims = tuple(claims_of(expert, results, p_values, sum(sure.pairs_E)) for expert in experts)
        shown = tuple(tops.of_expert(layer.layer, expert) for expert in experts)
        layers.append(LayerAtlas(layer, results, p_values, sure, shown, claims))
    return Atlas(
        probe.record,
        None if tagger is None else tagger.name,
        draws,
        reader.grid,
        labels,
        {label.name: reader.values[label.name].names for label in labels},
        tuple(layers),
        count_together(trace),
        encode_images(probe, tops.shown_samples()),
    )
