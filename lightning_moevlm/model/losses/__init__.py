"""Auxiliary losses: functions of plans, and the set of switches that turns them on."""

from lightning_moevlm.model.losses.auxiliary import OWN_LOSSES, AuxiliaryLosses, SumName
from lightning_moevlm.model.losses.balancing.cross_layer_balance import CrossLayerBalance
from lightning_moevlm.model.losses.balancing.gshard import GShard
from lightning_moevlm.model.losses.balancing.importance import Importance
from lightning_moevlm.model.losses.balancing.load import Load
from lightning_moevlm.model.losses.balancing.load_balance import LoadBalance
from lightning_moevlm.model.losses.balancing.modality_entropy import GlobalEntropy, LocalEntropy
from lightning_moevlm.model.losses.balancing.mutual_information import MutualInformation
from lightning_moevlm.model.losses.balancing.sequence_balance import SequenceBalance
from lightning_moevlm.model.losses.groups import Grouping
from lightning_moevlm.model.losses.loss_input import LayerCounts, LossInput, Place, RoutedLayer, StepSize
from lightning_moevlm.model.losses.plan_loss import PlanLoss
from lightning_moevlm.model.losses.regularising.expert_coupling import ExpertCoupling
from lightning_moevlm.model.losses.regularising.output_z import OutputZ, output_z
from lightning_moevlm.model.losses.regularising.relu_l1 import ReLUL1
from lightning_moevlm.model.losses.regularising.router_orthogonality import RouterOrthogonality, router_orthogonality
from lightning_moevlm.model.losses.regularising.router_z import RouterZ
from lightning_moevlm.model.losses.routing_loss import RoutingLoss
from lightning_moevlm.model.losses.weights import AdaptiveWeight, ByOverflow, BySparsity, Weight

__all__ = [
    "OWN_LOSSES",
    "AdaptiveWeight",
    "AuxiliaryLosses",
    "ByOverflow",
    "BySparsity",
    "CrossLayerBalance",
    "ExpertCoupling",
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
    "output_z",
    "router_orthogonality",
]
