"""Groups the samples of a probe by what they hold, for effects by category."""

from collections import defaultdict
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from lightning_moevlm.atlas.causal.effects import LEAST, Member
from lightning_moevlm.atlas.labels.label import OTHER, Label
from lightning_moevlm.atlas.routing.trace import Trace
from lightning_moevlm.contracts.routing_plan import Modality

EVERY = "all samples"
_OF_SAMPLES = ("object", "category", "object colour", "question kind", "class", "word", "colour")
"""Labels by which samples differ; all of them have the same positions."""
_MOST_VALUES = 12
_ROWS = 256


def group_samples(
    trace: Trace, names: Mapping[str, tuple[str, ...]], wanted: Collection[str] = ()
) -> dict[str, Member]:
    """Return the samples of each group, bool (N), by name.

    A sample belongs to the group "category fruit" if a patch or a word of it does. Groups that hold, or lack, fewer
    than `LEAST` samples are left out, and of each label all but the most frequent values: the more groups, the fewer
    effects stand after Holm.

    Args:
        trace: of N samples.
        names: values of each label, by code.
        wanted: groups that are kept however rare they are.
    """
    found: dict[str, dict[str, Member]] = defaultdict(dict)
    for label in trace.labels():
        kind = group_kind(label)
        if kind is None:
            continue
        for value, member_N in _members(trace, label, names.get(label.name, ())).items():
            known_N = found[kind].get(value, np.zeros(trace.num_samples, np.bool_))
            found[kind][value] = known_N | member_N
    found["modality"] = _by_modality(trace)
    found["source"] = _by_source(trace)
    groups = {EVERY: np.ones(trace.num_samples, np.bool_)}
    for kind, members in found.items():
        tested = {value: member_N for value, member_N in members.items() if _is_tested(member_N)}
        order = sorted(tested, key=lambda value: -int(tested[value].sum()))
        kept = [value for place, value in enumerate(order) if place < _MOST_VALUES or f"{kind} {value}" in wanted]
        groups |= {f"{kind} {value}": tested[value] for value in kept}
    return groups


def group_kind(label: Label) -> str | None:
    """Return what the groups of a label are called; None for a label by which samples do not differ."""
    kind = label.name.rpartition("/")[2]
    return kind if kind in _OF_SAMPLES else None


def _members(trace: Trace, label: Label, names: tuple[str, ...]) -> dict[str, Member]:
    member_NV = np.zeros((trace.num_samples, len(names)), np.bool_)
    for rows in trace.blocks(_ROWS):
        code_BS = trace.label(label.name, rows)
        row_M, place_M = np.nonzero(code_BS >= 0)
        member_NV[rows.start + row_M, code_BS[row_M, place_M]] = True
    return {name: member_NV[:, code] for code, name in enumerate(names) if name != OTHER}


def _by_modality(trace: Trace) -> dict[str, Member]:
    """Return which samples are pairs, images alone and texts alone."""
    has = {modality: _has_tokens(trace, modality) for modality in Modality}
    image_N, text_N = has[Modality.IMAGE], has[Modality.TEXT]
    return {"pair": image_N & text_N, "image": image_N & ~text_N, "text": text_N & ~image_N}


def _has_tokens(trace: Trace, modality: Modality) -> NDArray[np.bool_]:
    found_N = np.zeros(trace.num_samples, np.bool_)
    for rows in trace.blocks(_ROWS):
        found_N[rows] = (trace.label(f"{modality.label}/position", rows) >= 0).any(axis=1)
    return found_N


def _by_source(trace: Trace) -> dict[str, Member]:
    found: dict[str, Member] = {}
    for number, name in enumerate(trace.sources):
        found[name] = trace.source_numbers() == number
    return found


def _is_tested(member_N: Member) -> bool:
    return LEAST <= int(member_N.sum()) <= len(member_N) - LEAST
