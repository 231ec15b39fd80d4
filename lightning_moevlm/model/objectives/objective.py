"""The objective contract."""

from abc import abstractmethod
from collections.abc import Collection, Mapping

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.model_card import Costs, add_costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.step_records import BatchSize, ObjectiveOutput, PlanSize
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.initial_weights import Module
from lightning_moevlm.model.metrics.measure import Measure
from lightning_moevlm.model.metrics.tasks.accuracy import Accuracy
from lightning_moevlm.model.objectives.draws import Draws
from lightning_moevlm.model.precision import PrecisionPolicy, Region


class Objective(Module):
    """Makes task terms of a batch; the first constructor argument is the backbone's spec.

    num_classes: number of classes of every term that predicts classes, by term name.

    spans_ranks: a mode like `training`, on while several ranks run the same step: only then may one wait for another.

    separate_passes: sources of `size` whose images and texts do not attend to each other.

    pairs_reach_all: whether every batch of pairs gives a gradient to every part of the backbone and of the objective.
    """

    path_in_model = "objective"
    num_classes: dict[str, int]
    pairs_reach_all: bool = False
    separate_passes: frozenset[str] = frozenset()
    spans_ranks: bool = False
    region: Region = "heads"
    precision = PrecisionPolicy()

    def can_use(self, batch: Batch) -> bool:
        """Return whether there is a term for what a batch holds."""
        return True

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone that this objective cannot train, with a UserError."""

    def check_sources(self, names: Collection[str]) -> None:
        """Refuse data whose sources of these names lack one that this objective trains on, with a UserError."""

    def samples_of(self, part: "Objective", batch: Batch) -> Batch:
        """Return the samples of a batch that a part of this objective uses."""
        return batch

    @abstractmethod
    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Compute the terms; every random choice is taken from `draws`, so it follows from the sample and the step."""

    def size(self, batch: Batch) -> BatchSize | None:
        """Return what the means of `forward` are over, of a batch that may lack its pixels; None: unknown beforehand.

        It names the same terms and sources for every batch. With it, the gradient over micro-batches and ranks
        is that of their joined batch; without, all of them count alike.
        """
        return None

    def costs(self, backbone: Backbone, batch: Batch) -> Costs | None:
        """Return the costs of `forward` on a batch without padding, which may lack its pixels.

        Networks that make the targets are not counted. None: unknown, because `size` or `head_costs` is.
        """
        size = self.size(batch)
        if size is None:
            return None
        heads = self.head_costs({name: int(number) for name, number in size.predictions.items()})
        if heads is None:
            return None
        return heads + add_costs(
            _pass_costs(backbone, one, source in self.separate_passes) for source, one in size.passes.items()
        )

    def head_costs(self, predictions: Mapping[str, int]) -> Costs | None:
        """Return the costs of the heads for so many predictions of each term of `size`; None: unknown."""
        return None

    def measures(self, prefix: str = "", weight: float = 1.0) -> list[Measure]:
        """Return new measures of an evaluation, beside its losses: by default the accuracy of terms with classes.

        Args:
            prefix: of the names of terms, for a part of a joint objective.
            weight: of that part.
        """
        return [Accuracy({prefix + term: count for term, count in self.num_classes.items()})]


def _pass_costs(backbone: Backbone, size: PlanSize, separate: bool) -> Costs:
    """Return the costs of the sequences of a pass, all of which are as long as their mean."""
    sequences = int(size.sequences)
    if not sequences:
        return Costs()
    tokens = {modality: int(size.tokens_A[modality]) // sequences for modality in Modality}
    return backbone.costs({modality: count for modality, count in tokens.items() if count}, separate) * sequences
