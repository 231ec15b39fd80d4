"""The set of auxiliary losses: one nullable field per loss, so that an arm turns one off without touching the others.

A loss on routing is the mean over the plans of a step (MoE layers x forward passes), so its scale does not move with
depth.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_moevlm.errors import UserError
from lightning_moevlm.losses.gshard import GShard
from lightning_moevlm.losses.importance import Importance
from lightning_moevlm.losses.load import Load
from lightning_moevlm.losses.load_balance import LoadBalance
from lightning_moevlm.losses.loss_input import LossInput, RoutedLayer
from lightning_moevlm.losses.modality_entropy import GlobalEntropy, LocalEntropy
from lightning_moevlm.losses.mutual_information import MutualInformation
from lightning_moevlm.losses.output_z import OutputZ
from lightning_moevlm.losses.relu_l1 import ReLUL1
from lightning_moevlm.losses.router_orthogonality import RouterOrthogonality
from lightning_moevlm.losses.router_z import RouterZ
from lightning_moevlm.losses.routing_loss import RoutingLoss
from lightning_moevlm.losses.sequence_balance import SequenceBalance
from lightning_moevlm.losses.weights import AdaptiveWeight, Weight, check_weight, first_value
from lightning_moevlm.records import Term

_BALANCING = frozenset(
    {"load_balance", "importance", "load", "gshard", "sequence_balance", "global_entropy", "mutual_information"}
)
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@runtime_checkable
class _Particular(Protocol):
    """A loss that is not defined for every router."""

    def check(self, layer: RoutedLayer) -> None: ...


@dataclass(frozen=True)
class AuxiliaryLosses:
    """Auxiliary losses; null turns one off.

    Args:
        load_balance: Switch load-balancing loss, over a sequence, a micro-batch or the whole optimiser step.
        router_z: ST-MoE router z-loss.
        output_z: PaLM z-loss on the output logits of heads that predict classes.
        importance: equal total gate weight.
        load: equal expected load; needs a router with noise.
        gshard: GShard's balance of first choices.
        sequence_balance: DeepSeek-V3, balance within each sequence.
        local_entropy: LIMoE, every token sure of its expert, per modality.
        global_entropy: LIMoE, every modality spread over experts.
        mutual_information: of tokens and experts, to be large.
        relu_l1: ReMoE, few active experts per token under ReLU routing.
        router_orthogonality: rows of a router that point in different directions.
        others: losses from elsewhere, each under a name of your choice.

    Raises:
        UserError: a negative weight, or a name that is taken or is none.
    """

    load_balance: LoadBalance | None = field(default_factory=LoadBalance)
    router_z: RouterZ | None = field(default_factory=RouterZ)
    output_z: OutputZ | None = None
    importance: Importance | None = None
    load: Load | None = None
    gshard: GShard | None = None
    sequence_balance: SequenceBalance | None = None
    local_entropy: LocalEntropy | None = None
    global_entropy: GlobalEntropy | None = None
    mutual_information: MutualInformation | None = None
    relu_l1: ReLUL1 | None = None
    router_orthogonality: RouterOrthogonality | None = None
    others: dict[str, RoutingLoss | None] | None = None

    def __post_init__(self) -> None:
        """Check names and weights."""
        for name in self.others or {}:
            if name in OWN_LOSSES or not _NAME.fullmatch(name):
                raise UserError(
                    f"losses.others.{name}: choose a name of small letters, digits and _ that is none of "
                    f"{', '.join(OWN_LOSSES)}"
                )
        for name, weight in self.weights.items():
            check_weight(f"{self.key(name)}.weight", weight)

    def check(self, layers: Iterable[RoutedLayer]) -> None:
        """Refuse a loss that is undefined for a layer; a dense model has none.

        Raises:
            UserError: with what to change.
        """
        for layer in layers:
            for loss in self.enabled.values():
                if isinstance(loss, _Particular):
                    loss.check(layer)

    @property
    def enabled(self) -> dict[str, Callable[..., Any]]:
        """The losses that are on, by name."""
        everyone = {name: getattr(self, name) for name in OWN_LOSSES} | (self.others or {})
        return {name: loss for name, loss in everyone.items() if loss is not None}

    @property
    def weights(self) -> dict[str, Weight]:
        """The weight of each enabled loss, as it was configured."""
        return {name: loss.weight for name, loss in self.enabled.items()}  # type: ignore[attr-defined]

    @property
    def balancing(self) -> frozenset[str]:
        """The enabled losses that spread tokens over experts; the others keep logits small, or choices sure or few."""
        others = {name for name, loss in (self.others or {}).items() if loss is not None and loss.balances}
        return frozenset((_BALANCING & self.enabled.keys()) | others)

    def key(self, name: str) -> str:
        """Return where a loss stands in a configuration of the model."""
        return f"losses.{name}" if name in OWN_LOSSES else f"losses.others.{name}"

    @property
    def reads_counts(self) -> bool:
        """Whether a loss asks for `LossInput.counts`."""
        return self.load_balance is not None and self.load_balance.scope == "global"

    @property
    def adapts(self) -> bool:
        """Whether a weight follows the counts of each optimiser step."""
        return any(isinstance(weight, AdaptiveWeight) for weight in self.weights.values())

    def terms(
        self,
        inputs: Sequence[LossInput],
        log_partitions: Mapping[str, Tensor] = MappingProxyType({}),
        weights: Mapping[str, float | Tensor] | None = None,
    ) -> dict[str, Term]:
        """Return each enabled loss, averaged over plans; one that is undefined here is left out.

        A dense model (no inputs) has no losses on routing. log_partitions: of every class-predicting term of the task,
        its logsumexp per masked position, fp32 (M,). weights: those in force; None: those of the first step.
        """
        in_force = {name: first_value(weight) for name, weight in self.weights.items()} | dict(weights or {})
        terms: dict[str, Term] = {}
        for name, loss in self.enabled.items():
            if isinstance(loss, OutputZ):
                raw = loss(log_partitions)
            else:
                values = [value for value in map(loss, inputs) if value is not None]
                raw = torch.stack(values).mean() if values else None
            if raw is not None:
                terms[name] = Term(raw, in_force[name])
        return terms


OWN_LOSSES = tuple(entry.name for entry in fields(AuxiliaryLosses) if entry.name != "others")
"""The names of our own."""
