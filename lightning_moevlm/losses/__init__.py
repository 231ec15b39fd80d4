"""Auxiliary losses: pure functions of plans, and the set of switches that turns them on."""

from lightning_moevlm.losses.auxiliary import OWN_LOSSES, AuxiliaryLosses, SumName
from lightning_moevlm.losses.groups import Grouping
from lightning_moevlm.losses.gshard import GShard, gshard
from lightning_moevlm.losses.importance import Importance, importance
from lightning_moevlm.losses.load import Load, load
from lightning_moevlm.losses.load_balance import LoadBalance, load_balance
from lightning_moevlm.losses.loss_input import LayerCounts, LossInput, Place, RoutedLayer, StepSize
from lightning_moevlm.losses.modality_entropy import GlobalEntropy, LocalEntropy
from lightning_moevlm.losses.mutual_information import MutualInformation, mutual_information
from lightning_moevlm.losses.output_z import OutputZ, output_z
from lightning_moevlm.losses.plan_loss import PlanLoss
from lightning_moevlm.losses.relu_l1 import ReLUL1, relu_l1
from lightning_moevlm.losses.router_orthogonality import RouterOrthogonality, router_orthogonality
from lightning_moevlm.losses.router_z import RouterZ, router_z
from lightning_moevlm.losses.routing_loss import RoutingLoss
from lightning_moevlm.losses.sequence_balance import SequenceBalance
from lightning_moevlm.losses.weights import AdaptiveWeight, ByOverflow, BySparsity, Weight

__all__ = [
    "OWN_LOSSES",
    "AdaptiveWeight",
    "AuxiliaryLosses",
    "ByOverflow",
    "BySparsity",
    "GShard",
    "GlobalEntropy",
    "Grouping",
    "Importance",
    "LayerCounts",
    "Load",
    "LoadBalance",
    "LocalEntropy",
    "LossInput",
    "MutualInformation",
    "OutputZ",
    "Place",
    "PlanLoss",
    "ReLUL1",
    "RoutedLayer",
    "RouterOrthogonality",
    "RouterZ",
    "RoutingLoss",
    "SequenceBalance",
    "StepSize",
    "SumName",
    "Weight",
    "gshard",
    "importance",
    "load",
    "load_balance",
    "mutual_information",
    "output_z",
    "relu_l1",
    "router_orthogonality",
    "router_z",
]
