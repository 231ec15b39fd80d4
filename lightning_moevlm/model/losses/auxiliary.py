"""The set of auxiliary losses: one nullable field per loss, so that an arm turns one off without touching the others.

A loss on routing is the mean over the plans of a step (MoE layers x forward passes), so its scale does not move with
depth. Over micro-batches and ranks the gradient is that of the joined batch for router_z, output_z, sequence_balance,
local_entropy, router_orthogonality, load_balance over a sequence, relu_l1 without loads and, but for its noise,
expert_coupling; over ranks for load_balance of global scope. The others are balances of a batch: their loss is the mean
of those of micro-batches, and it moves with the size of these. In evaluation each is one value, of all batches
together.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.step_records import PlanSize, Term
from lightning_moevlm.model.losses.balancing.cross_layer_balance import CrossLayerBalance
from lightning_moevlm.model.losses.balancing.gshard import GShard
from lightning_moevlm.model.losses.balancing.importance import Importance
from lightning_moevlm.model.losses.balancing.load import Load
from lightning_moevlm.model.losses.balancing.load_balance import LoadBalance
from lightning_moevlm.model.losses.balancing.modality_entropy import GlobalEntropy, LocalEntropy
from lightning_moevlm.model.losses.balancing.mutual_information import MutualInformation
from lightning_moevlm.model.losses.balancing.sequence_balance import SequenceBalance
from lightning_moevlm.model.losses.groups import sizes_of
from lightning_moevlm.model.losses.loss_input import LossInput, Place, RoutedLayer, StepSize
from lightning_moevlm.model.losses.plan_loss import PlanLoss
from lightning_moevlm.model.losses.regularising.expert_coupling import ExpertCoupling
from lightning_moevlm.model.losses.regularising.output_z import OutputZ, output_z_sums
from lightning_moevlm.model.losses.regularising.relu_l1 import ReLUL1
from lightning_moevlm.model.losses.regularising.router_orthogonality import RouterOrthogonality
from lightning_moevlm.model.losses.regularising.router_z import RouterZ
from lightning_moevlm.model.losses.routing_loss import RoutingLoss
from lightning_moevlm.model.losses.weights import AdaptiveWeight, Weight, check_weight, first_value

_BALANCING = frozenset(
    {
        *("load_balance", "cross_layer_balance", "importance", "load", "gshard", "sequence_balance", "global_entropy"),
        "mutual_information",
    }
)
SumName = tuple[str, Place | str]
"""A loss and the place of a plan, or the term whose logits it is on; without a name of a loss: the size of a plan."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@runtime_checkable
class _ChecksLayer(Protocol):
    """A loss that is not defined for every router."""

    def check(self, layer: RoutedLayer) -> None: ...


@dataclass(frozen=True)
class AuxiliaryLosses:
    """Auxiliary losses; null turns one off.

    Args:
        load_balance: Switch load-balancing loss, over a sequence, a micro-batch or the whole optimiser step.
        cross_layer_balance: Load-balancing loss over all layers together, as Hugging Face transformers computes it, in
            place of load_balance.
        router_z: ST-MoE router z-loss.
        output_z: PaLM z-loss on the output logits of heads that predict classes.
        importance: Importance loss: equal total gate weight of the experts.
        load: Load loss: equal expected load of the experts; needs a router with noise.
        gshard: GShard balance loss: over first choices alone.
        sequence_balance: DeepSeek-V3 balance loss within each sequence.
        local_entropy: LIMoE local entropy loss: each token's distribution over experts is sharp, per modality.
        global_entropy: LIMoE global entropy loss: each modality is spread over experts.
        mutual_information: Mutual information loss: raises the mutual information of tokens and experts.
        relu_l1: ReMoE L1 loss: few active experts per token under ReLU routing.
        router_orthogonality: Orthogonality loss: the rows of a router have different directions.
        expert_coupling: ERC loss: each expert answers strongest to its own row of the router.
        others: Losses from other packages, each under a name of your choice.

    Raises:
        UserError: a negative weight, an invalid or used name, or the same balance twice.
    """

    load_balance: LoadBalance | None = field(default_factory=LoadBalance)
    router_z: RouterZ | None = field(default_factory=RouterZ)
    output_z: OutputZ | None = None
    cross_layer_balance: CrossLayerBalance | None = None
    importance: Importance | None = None
    load: Load | None = None
    gshard: GShard | None = None
    sequence_balance: SequenceBalance | None = None
    local_entropy: LocalEntropy | None = None
    global_entropy: GlobalEntropy | None = None
    mutual_information: MutualInformation | None = None
    relu_l1: ReLUL1 | None = None
    router_orthogonality: RouterOrthogonality | None = None
    expert_coupling: ExpertCoupling | None = None
    others: dict[str, RoutingLoss | None] | None = None

    def __post_init__(self) -> None:
        """Check names and weights."""
        for name in self.others or {}:
            if name in OWN_LOSSES or not _NAME.fullmatch(name):
                raise UserError(
                    f"losses.others.{name}: choose a name of lower-case letters, digits and _ that is not one of "
                    f"{', '.join(OWN_LOSSES)}"
                )
        for name, weight in self.weights.items():
            check_weight(f"{self.key(name)}.weight", weight)
        if self.load_balance is not None and self.cross_layer_balance is not None:
            raise UserError(
                "losses.load_balance and losses.cross_layer_balance are both on, so the load would be balanced twice: "
                "set one of them to null"
            )

    def check(self, layers: Iterable[RoutedLayer]) -> None:
        """Refuse a loss that is undefined for a layer; a dense model has none.

        Raises:
            UserError: with what to change.
        """
        for layer in layers:
            for loss in self.enabled.values():
                if isinstance(loss, _ChecksLayer):
                    loss.check(layer)

    @property
    def enabled(self) -> dict[str, PlanLoss | OutputZ]:
        """The losses that are on, by name."""
        losses: dict[str, PlanLoss | OutputZ | None] = {name: getattr(self, name) for name in OWN_LOSSES}
        losses |= self.others or {}
        return {name: loss for name, loss in losses.items() if loss is not None}

    @property
    def weights(self) -> dict[str, Weight]:
        """The weight of each enabled loss, as it was configured."""
        return {name: loss.weight for name, loss in self.enabled.items()}  # type: ignore[union-attr]

    @property
    def balancing(self) -> frozenset[str]:
        """The enabled losses that spread tokens over experts; the others keep logits small, or choices sure or few."""
        others = {name for name, loss in (self.others or {}).items() if loss is not None and loss.balances}
        return frozenset((_BALANCING & self.enabled.keys()) | others)

    def key(self, name: str) -> str:
        """Return the key of a loss in the configuration of the model."""
        return f"losses.{name}" if name in OWN_LOSSES else f"losses.others.{name}"

    @property
    def reads_counts(self) -> bool:
        """True if a loss reads `LossInput.counts`."""
        return self.load_balance is not None and self.load_balance.scope == "global"

    @property
    def adapts(self) -> bool:
        """True if a weight follows the counts of each optimiser step."""
        return any(isinstance(weight, AdaptiveWeight) for weight in self.weights.values())

    def terms(
        self,
        inputs: Sequence[LossInput],
        log_partitions: Mapping[str, Tensor] = MappingProxyType({}),
        weights: Mapping[str, float | Tensor] | None = None,
        step: StepSize | None = None,
    ) -> dict[str, Term]:
        """Return each enabled loss, averaged over plans; one that is undefined here is left out.

        A dense model (no inputs) has no losses on routing. log_partitions: of every class-predicting term of the task,
        its logsumexp per masked position, fp32 (M,). weights: those in force; None: those of the first step. step: of
        which this batch is a part; None: the batch is the whole step.
        """
        in_force = self._in_force(weights)
        sizes = sizes_of([one.plan for one in inputs])
        terms: dict[str, Term] = {}
        for name, loss in self.enabled.items():
            if isinstance(loss, OutputZ):
                raw, in_step = loss(log_partitions), None if step is None else loss.in_step(log_partitions, step)
            else:
                found = [(own, k) for k, one in enumerate(inputs) if (own := loss.sums(one)) is not None]
                values = _values(loss, [(own, sizes[k], inputs[k].place) for own, k in found])
                raw = torch.stack(values).mean() if values else None
                in_step = None
                if step is not None and loss.adds_up and values:
                    parts = [loss.value(own, step.plan_size(inputs[k].place)) for own, k in found]
                    in_step = torch.stack(parts).sum() * step.num_parts / step.num_plans
            if raw is not None:
                terms[name] = Term(raw, in_force[name], in_step=in_step)
        return terms

    def sums(
        self, inputs: Sequence[LossInput], log_partitions: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[SumName, Tensor]:
        """Return what is to be added up over batches and ranks, for `means`."""
        found: dict[SumName, Tensor] = {}
        for one, size in zip(inputs, sizes_of([one.plan for one in inputs]), strict=True):
            found["", one.place] = torch.cat([size.tokens_A, size.sequences_A, size.sequences.unsqueeze(0)])
        for name, loss in self.enabled.items():
            if isinstance(loss, OutputZ):
                found |= {(name, term): output_z_sums(value_M) for term, value_M in log_partitions.items()}
                continue
            for one in inputs:
                own = loss.sums(one)
                if own is not None:
                    found[name, one.place] = own
        return found

    def means(
        self, sums: Mapping[SumName, Tensor], weights: Mapping[str, float | Tensor] | None = None
    ) -> dict[str, Term]:
        """Return each enabled loss of all that was added up, averaged over plans."""
        in_force = self._in_force(weights)
        kinds = len(Modality)
        sizes = {
            place: PlanSize(numbers[:kinds], numbers[kinds : 2 * kinds], numbers[-1])
            for (name, place), numbers in sums.items()
            if not name
        }
        terms: dict[str, Term] = {}
        for name, loss in self.enabled.items():
            own = {place: each for (of, place), each in sums.items() if of == name}
            if isinstance(loss, OutputZ):
                values = [each[0] / each[1] for each in own.values() if each[1]]
            else:
                of_plans = [(each, sizes[place], place) for place, each in own.items() if isinstance(place, Place)]
                values = _values(loss, of_plans)
            if values:
                terms[name] = Term(torch.stack(values).mean(), in_force[name])
        return terms

    def _in_force(self, weights: Mapping[str, float | Tensor] | None) -> dict[str, float | Tensor]:
        return {name: first_value(weight) for name, weight in self.weights.items()} | dict(weights or {})


def _values(loss: PlanLoss, parts: Iterable[tuple[Tensor, PlanSize, Place]]) -> list[Tensor]:
    """Return the value of each plan's sums, or of those of all layers that see the same tokens together."""
    if not loss.joins_layers:
        return [loss.value(sums, size) for sums, size, _ in parts]
    joined: dict[object, tuple[Tensor, PlanSize]] = {}
    for sums, size, place in parts:
        kind = (place.source, place.modalities, sums.shape)
        if kind in joined:
            before, tokens = joined[kind]
            sums, size = before + sums, PlanSize(*(a + b for a, b in zip(tokens, size, strict=True)))
        joined[kind] = (sums, size)
    return [loss.value(sums, size) for sums, size in joined.values()]


OWN_LOSSES = tuple(entry.name for entry in fields(AuxiliaryLosses) if entry.name != "others")
"""Names of the losses of this package."""
