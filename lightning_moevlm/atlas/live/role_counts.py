"""Counts which experts serve which values on a small probe, and turns the counts into metrics.

NMI            I(expert; label) / min(H(expert), H(label)), over the tokens of a layer
by chance      its mean if the samples of a batch exchange their labels at the same positions
top category   share of an expert's tokens of objects that are of its most frequent category
base           share of the most frequent category among all tokens of objects: a blind expert has it
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from lightning_moevlm.atlas.labels.label import BY_NAME, Label, Null, Values
from lightning_moevlm.atlas.labels.label_tokens import TokenLabels
from lightning_moevlm.atlas.labels.scene_objects import GROUND
from lightning_moevlm.atlas.routing.route import LayerChoices
from lightning_moevlm.atlas.statistics.information import Floats, entropy, mutual_information, normalise
from lightning_moevlm.atlas.statistics.null_models import BlockPairs, Shape, draw_samples, tabulate
from lightning_moevlm.contracts import metric_keys

_CATEGORIES = ("image/category", "text/category")
_LABELS = ("modality", *_CATEGORIES, "image/question kind", "text/question kind", "image/class")
_DRAWS = 8  # of the null model: their mean is logged, and no p


class RoleCounter:
    """Counts over the batches of a probe.

    Args:
        values: of each label; all batches have been labelled.
    """

    def __init__(self, values: Mapping[str, Values]) -> None:
        self._names = {name: values[name].names for name in _LABELS if values[name].names}
        self._tables: dict[_Place, _Table] = {}

    def add(self, layers: Iterable[LayerChoices], labels: TokenLabels) -> None:
        """Count a batch."""
        for layer in layers:
            for name, names in self._names.items():
                table = _count(layer, labels, BY_NAME[name], len(names))
                if table is not None:
                    place = _Place(layer.block, layer.layer, name)
                    self._tables[place] = table if place not in self._tables else self._tables[place].plus(table)

    def metrics(self) -> dict[str, float]:
        """Return the metrics by key; labels with a single value in a layer tell nothing and are left out."""
        found: dict[str, float] = {}
        for place, table in self._tables.items():
            found |= _information(place, table)
            if place.label in _CATEGORIES:
                is_object_V = np.array([name != GROUND for name in self._names[place.label]])
                found |= _top_categories(place, table.counts_EV[:, is_object_V])
        return found


class _Place(NamedTuple):
    block: int
    layer: str
    label: str

    @property
    def parts(self) -> dict[str, str | int]:
        """Return what stands for the braces of a key."""
        tokens, _, label = self.label.rpartition("/")
        return {"block": self.block, "tokens": tokens or "both", "label": label.replace(" ", "_")}


class _Table(NamedTuple):
    """Pairs by expert and value, and the same for draws of the null model (B, E, V); None without one."""

    counts_EV: Floats
    drawn_BEV: Floats | None

    def plus(self, other: "_Table") -> "_Table":
        has_null = self.drawn_BEV is not None and other.drawn_BEV is not None
        return _Table(self.counts_EV + other.counts_EV, self.drawn_BEV + other.drawn_BEV if has_null else None)  # type: ignore[operator]


def _count(layer: LayerChoices, labels: TokenLabels, label: Label, num_values: int) -> _Table | None:
    code_BS = labels.codes[label.name].astype(np.int64)
    known_BS = layer.seen_BS.numpy() & (code_BS >= 0)
    if not known_BS.any():
        return None
    chosen_BSE = layer.chosen_BSE.numpy() * known_BS[..., None]
    shape = Shape(chosen_BSE.shape[-1], num_values)
    row_N, position_N, expert_N = np.nonzero(chosen_BSE)
    weight_N = chosen_BSE[row_N, position_N, expert_N].astype(np.float64)
    counts_EV = tabulate(expert_N, code_BS[row_N, position_N], weight_N, shape)
    if Null.SAMPLES not in label.beyond:
        return _Table(counts_EV, None)
    block = BlockPairs(known_BS, code_BS, row_N, position_N, expert_N, weight_N)
    return _Table(counts_EV, draw_samples([block], shape, _DRAWS, np.random.default_rng(0)))


def _information(place: _Place, table: _Table) -> dict[str, float]:
    counts_EV = table.counts_EV
    if np.count_nonzero(counts_EV.sum(axis=0)) < 2:
        return {}
    entropies = entropy(counts_EV.sum(axis=1)), entropy(counts_EV.sum(axis=0))
    nmi = float(normalise(mutual_information(counts_EV).whole, *entropies))
    found = {metric_keys.EXPERT_NMI.key(**place.parts): nmi}
    if table.drawn_BEV is not None:
        by_chance = mutual_information(table.drawn_BEV).whole.mean()
        found[metric_keys.EXPERT_NMI_BY_CHANCE.key(**place.parts)] = float(normalise(by_chance, *entropies))
    return found


def _top_categories(place: _Place, counts_EV: Floats) -> dict[str, float]:
    """Return the share of each expert's most frequent category, of experts with such tokens, and of all."""
    if not counts_EV.sum():
        return {}
    where = {"block": place.block, "tokens": place.parts["tokens"]}
    found = {
        metric_keys.TOP_CATEGORY.key(**where, expert=expert): float(count_V.max() / count_V.sum())
        for expert, count_V in enumerate(counts_EV)
        if count_V.sum()
    }
    value_V = counts_EV.sum(axis=0)
    return found | {metric_keys.TOP_CATEGORY_BASE.key(**where): float(value_V.max() / value_V.sum())}
