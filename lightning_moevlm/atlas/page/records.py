"""Turns an atlas into plain records, for JSON and for the page, and into tensors.

JSON has what a reader looks up; the tensors have every number:

    counts/LAYER/LABEL            (E, V)   chosen pairs by expert and value
    lift|low|high/LAYER/LABEL     (E, V)   share over base, with its 95 % interval
    nmi|p|adjusted_p/LAYER/LABEL  (E,)     of each expert
    together/LAYER/LAYER          (E, E')  tokens that two experts share
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_moevlm.atlas.make_atlas import Atlas
from lightning_moevlm.atlas.section import finite
from lightning_moevlm.atlas.statistics.claims import ALPHA, Claim
from lightning_moevlm.atlas.statistics.information import Floats, entropy
from lightning_moevlm.atlas.statistics.specialisation import Specialisation

FORMAT = "moevlm-atlas/1"
_VALUES_SHOWN = 8
"""Of a label in the sheet of an expert: those with the most tokens above their base."""
_PARTNERS_SHOWN = 5


def to_records(atlas: Atlas, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything as plain values. about: the model, such as its run and checkpoint."""
    return {
        "format": FORMAT,
        "model": dict(about),
        "probe": atlas.probe.as_json(),
        "tagger": atlas.tagger,
        "draws": atlas.draws,
        "alpha": ALPHA,
        "grid": atlas.patches_of_side,
        "labels": [{"name": each.name, "title": each.title, "null_models": [*each.beyond]} for each in atlas.labels],
        "layers": [_layer(atlas, number) for number in range(len(atlas.of_layers))],
    }


def to_tensors(atlas: Atlas) -> dict[str, NDArray[np.float32]]:
    """Return every number, by name."""
    tensors: dict[str, Floats] = {}
    for each in atlas.of_layers:
        for result, adjusted_E in zip(each.results, each.adjusted, strict=True):
            place = f"{each.layer.layer}/{result.label.name}"
            tensors |= {
                f"counts/{place}": result.counts_EV,
                f"lift/{place}": result.lift_EV,
                f"low/{place}": result.low_EV,
                f"high/{place}": result.high_EV,
                f"nmi/{place}": result.nmi_E,
                f"p/{place}": result.p_E,
                f"adjusted_p/{place}": adjusted_E,
            }
    for (first, second), counts in atlas.together.items():
        tensors[f"together/{atlas.of_layers[first].layer.layer}/{atlas.of_layers[second].layer.layer}"] = counts
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def write_tensors(atlas: Atlas, file: Path) -> None:
    """Write all numbers as safetensors."""
    from safetensors.numpy import save_file

    names = {
        f"values/{each.layer.layer}/{result.label.name}": "\n".join(result.values)
        for each in atlas.of_layers
        for result in each.results
    }
    save_file(to_tensors(atlas), file, {"format": FORMAT, **names})


def _layer(atlas: Atlas, number: int) -> dict[str, Any]:
    each = atlas.of_layers[number]
    load_E = each.load_E
    return {
        "layer": each.layer.layer,
        "block": each.layer.block,
        "experts": each.layer.num_experts,
        "use_entropy": finite(float(entropy(load_E)) / max(math.log(each.layer.num_experts), 1e-12)),
        "crossover": finite(each.crossover),
        "confidence": {
            name: {
                "tokens": found.num_tokens,
                "top": finite(found.top),
                "entropy": finite(found.entropy),
                "histogram": [finite(part) for part in found.histogram],
            }
            for name, found in each.confidence.of_modality.items()
        },
        "results": [_result(result) for result in each.results],
        "sheets": [_sheet(atlas, number, expert) for expert in range(each.layer.num_experts)],
    }


def _result(result: Specialisation) -> dict[str, Any]:
    base_V = result.counts_EV.sum(0) / result.counts_EV.sum()
    return {
        "label": result.label.name,
        "values": [*result.values],
        "base": [finite(share) for share in base_V],
        "entropy": finite(float(entropy(base_V))),
        "nmi": finite(result.nmi),
        "nmi_by_chance": finite(result.nmi_by_chance),
        "p": finite(result.p),
    }


def _sheet(atlas: Atlas, number: int, expert: int) -> dict[str, Any]:
    each = atlas.of_layers[number]
    tops = each.tops[expert]
    return {
        "load": finite(float(each.load_E[expert])),
        "weight": finite(each.confidence.weight_E[expert]),
        "serves": [_claim(claim) for claim in each.claims[expert]],
        "labels": [
            _of_label(result, float(adjusted_E[expert]), expert)
            for result, adjusted_E in zip(each.results, each.adjusted, strict=True)
        ],
        "patches": [
            {
                "source": one.source,
                "key": one.key,
                "row": one.patch // atlas.patches_of_side + 1,
                "column": one.patch % atlas.patches_of_side + 1,
                "weight": finite(one.weight),
                "caption": one.caption,
            }
            for one in tops.patches
        ],
        "words": [
            {"key": one.key, "weight": finite(one.weight), "before": one.before, "word": one.word, "after": one.after}
            for one in tops.words
        ],
        "together": _partners(atlas, number, number, expert),
        "before": _partners(atlas, number, _neighbour(atlas, number, -1), expert),
        "next": _partners(atlas, number, _neighbour(atlas, number, 1), expert),
    }


def _claim(claim: Claim) -> dict[str, Any]:
    return {name: finite(value) if isinstance(value, float) else value for name, value in claim._asdict().items()}


def _neighbour(atlas: Atlas, number: int, step: int) -> int | None:
    """Return the nearest layer before or after one that sees some of its tokens; None without one."""
    other = number + step
    while 0 <= other < len(atlas.of_layers):
        if atlas.together[min(number, other), max(number, other)].any():
            return other
        other += step
    return None


def _of_label(result: Specialisation, adjusted: float, expert: int) -> dict[str, Any]:
    """Return the numbers of an expert and a label; values: number, tokens, share, lift, its interval."""
    counts_V = result.counts_EV[expert]
    total = counts_V.sum()
    base_V = result.counts_EV.sum(0) / result.counts_EV.sum()
    excess_V = counts_V - total * base_V
    shown = [int(value) for value in np.argsort(-excess_V)[:_VALUES_SHOWN] if counts_V[value] > 0]
    return {
        "label": result.label.name,
        "entropy": finite(float(entropy(counts_V))),
        "nmi": finite(float(result.nmi_E[expert])),
        "p": finite(float(result.p_E[expert])),
        "adjusted_p": finite(adjusted),
        "p_of_null": {null: finite(float(p_E[expert])) for null, p_E in result.p_of_null.items()},
        "values": [
            [
                value,
                finite(float(counts_V[value])),
                finite(float(counts_V[value] / total)),
                *(finite(float(lift_EV[expert, value])) for lift_EV in (result.lift_EV, result.low_EV, result.high_EV)),
            ]
            for value in shown
        ],
    }


def _partners(atlas: Atlas, number: int, other: int | None, expert: int) -> dict[str, Any]:
    """Return the experts of a layer that serve the most tokens of an expert above their base."""
    if other is None:
        return {"layer": None, "experts": []}
    counts = atlas.together[min(number, other), max(number, other)]
    counts_EE = counts if number <= other else counts.T
    is_own = number == other
    own = counts_EE[expert, expert] if is_own else counts_EE[expert].sum()
    base_E = counts_EE.diagonal() if is_own else counts_EE.sum(0)
    base_E = base_E / max(float(base_E.sum()), 1e-20)
    share_E = counts_EE[expert] / max(float(own), 1e-20)
    chosen = [int(e) for e in np.argsort(-(share_E - base_E)) if not (is_own and e == expert)][:_PARTNERS_SHOWN]
    found = [
        {"expert": e, "share": finite(float(share_E[e])), "base": finite(float(base_E[e]))}
        for e in chosen
        if share_E[e] > 0
    ]
    return {"layer": other, "experts": found}
