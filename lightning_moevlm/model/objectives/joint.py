"""Several objectives at once: the task loss is the weighted sum of theirs (VLMo, arXiv 2111.02358, section 3.2).

Every part makes its own passes over what it can use of a batch; `PART_TERM` names its terms.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.model_card import Costs, add_costs
from lightning_moevlm.contracts.step_records import BatchSize, ObjectiveOutput
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.metrics.measure import Measure
from lightning_moevlm.model.objectives.draws import Draws
from lightning_moevlm.model.objectives.objective import Objective

_T = TypeVar("_T")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Joint(Objective):
    """Trains on several objectives in each step.

    Args:
        spec: the backbone's dimensions.
        parts: objectives, each under a name of your choice.
        weights: what the terms of a part are multiplied by, beside their own weights; 1 for a part without one.
        sources: names of the sources (`data.sources`) that a part trains on; all for a part without any.

    Raises:
        UserError: no part, a name that is not made of lower-case letters, digits and _, or a weight or sources without
            their part.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        parts: Mapping[str, Callable[[BackboneSpec], Objective]],
        weights: Mapping[str, float] | None = None,
        sources: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        weights, sources = weights or {}, sources or {}
        _check(parts, {"weights": weights, "sources": sources})
        built = {name: factory(spec) for name, factory in parts.items()}
        self.parts = nn.ModuleDict(built)
        self.weights = {name: weights.get(name, 1.0) for name in parts}
        self.sources = {name: tuple(chosen) for name, chosen in sources.items()}
        self.pairs_reach_all = not self.sources and all(part.pairs_reach_all for part in built.values())
        self.num_classes = {
            f"{name}_{term}": count for name, part in built.items() for term, count in part.num_classes.items()
        }
        _refuse_equal_measures(built)

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone that a part cannot train."""
        for _, part in self._named():
            part.check_backbone(backbone)

    def can_use(self, batch: Batch) -> bool:
        """Return whether any part has something to learn from a batch."""
        return any(part.can_use(self._own(name, batch)) for name, part in self._named())

    def check_sources(self, names: Collection[str]) -> None:
        """Refuse data that lack a source of a part."""
        for part, chosen in self.sources.items():
            lacking = sorted(set(chosen) - set(names))
            if lacking or not chosen:
                there = ", ".join(sorted(names)) or "none"
                raise UserError(
                    f"sources of Joint gives {part} {', '.join(lacking) or 'no source'}, and data.sources has {there}: "
                    "name one of these, or leave the part out of sources to train it on all"
                )

    def samples_of(self, part: Objective, batch: Batch) -> Batch:
        """Return those of the part's sources."""
        return next((self._own(name, batch) for name, each in self._named() if each is part), batch)

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Run every part that can use the batch."""
        outputs: dict[str, ObjectiveOutput] = {}
        for name, part in self._named():
            own = self._own(name, batch)
            if part.can_use(own):
                part.spans_ranks = self.spans_ranks
                outputs[name] = part(backbone, own, draws)
        if not outputs:
            raise UserError(
                f"no part of Joint ({', '.join(self.parts)}) can use this batch: add one that fits the data"
            )
        return ObjectiveOutput(
            terms={
                f"{name}_{term}": value._replace(weight=value.weight * self.weights[name])
                for name, output in outputs.items()
                for term, value in output.terms.items()
            },
            predictions=_prefixed({name: output.predictions for name, output in outputs.items()}),
            plans=tuple(
                plan._replace(source=f"{name}/{plan.source}")
                for name, output in outputs.items()
                for plan in output.plans
            ),
            num_tokens=sum(output.num_tokens for output in outputs.values()),
            attention=tuple(
                each._replace(source=f"{name}/{each.source}")
                for name, output in outputs.items()
                for each in output.attention
            ),
            log_partitions=_prefixed({name: output.log_partitions for name, output in outputs.items()}),
            embeddings=next((output.embeddings for output in outputs.values() if output.embeddings is not None), None),
            answered=next((output.answered for output in outputs.values() if output.answered is not None), None),
            matchable=next((output.matchable for output in outputs.values() if output.matchable is not None), None),
            judged=next((output.judged for output in outputs.values() if output.judged is not None), None),
            of_samples=_prefixed({name: output.of_samples for name, output in outputs.items()}),
        )

    def size(self, batch: Batch) -> BatchSize | None:
        """Return the sizes of all parts; None where one does not know its own."""
        sizes = {name: part.size(self._own(name, batch)) for name, part in self._named()}
        known = {name: size for name, size in sizes.items() if size is not None}
        if len(known) < len(sizes):
            return None
        predictions = _prefixed({name: size.predictions for name, size in known.items()})
        passes = {f"{name}/{source}": one for name, size in known.items() for source, one in size.passes.items()}
        return BatchSize(predictions, passes)

    def costs(self, backbone: Backbone, batch: Batch) -> Costs | None:
        """Return the sum over the parts; None where one does not know its own."""
        costs = [part.costs(backbone, batch) for _, part in self._named()]
        known = [each for each in costs if each is not None]
        return add_costs(known) if len(known) == len(costs) else None

    def measures(self, prefix: str = "", weight: float = 1.0) -> list[Measure]:
        """Return those of all parts."""
        return [
            measure
            for name, part in self._named()
            for measure in part.measures(f"{prefix}{name}_", weight * self.weights[name])
        ]

    def _own(self, name: str, batch: Batch) -> Batch:
        """Return the samples that a part uses: all of a batch that no loader made."""
        return batch.of_sources(self.sources[name]) if batch.sources and name in self.sources else batch

    def _named(self) -> list[tuple[str, Objective]]:
        return [(name, part) for name, part in self.parts.items() if isinstance(part, Objective)]


def _prefixed(of_parts: Mapping[str, Mapping[str, _T]]) -> dict[str, _T]:
    return {f"{name}_{term}": value for name, values in of_parts.items() for term, value in values.items()}


def _refuse_equal_measures(parts: Mapping[str, Objective]) -> None:
    measuring: dict[str, list[str]] = defaultdict(list)
    for name, part in parts.items():
        for what in {measure.alone for measure in part.measures() if measure.alone is not None}:
            measuring[what].append(name)
    for what, names in measuring.items():
        if len(names) > 1:
            raise UserError(f"parts {', '.join(names)} of Joint each compute {what}: keep one")


def _check(parts: Mapping[str, object], options: Mapping[str, Mapping[str, object]]) -> None:
    if not parts:
        raise UserError(
            "Joint has no parts: give it at least one objective, such as masked: {class_path: MaskedModelling}"
        )
    for name in parts:
        if not _NAME.fullmatch(name):
            raise UserError(f"part {name!r} of Joint: choose a name of lower-case letters, digits and _")
    for option, by_part in options.items():
        lacking = sorted(by_part.keys() - parts.keys())
        if lacking:
            raise UserError(
                f"{option} of Joint has {', '.join(lacking)}, which is not a part: remove it, or name one of "
                f"{', '.join(sorted(parts))}"
            )
