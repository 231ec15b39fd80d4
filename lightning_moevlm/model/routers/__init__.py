"""Routers: turn tokens into plans, and know nothing of experts, losses, metrics or configuration."""

from lightning_moevlm.model.routers.earlier_choices import EarlierChoices
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.group_limit import GroupLimit
from lightning_moevlm.model.routers.learned.cosine import CosineRouter
from lightning_moevlm.model.routers.learned.expert_choice import ExpertChoiceRouter
from lightning_moevlm.model.routers.learned.group_limited import GroupLimitedRouter
from lightning_moevlm.model.routers.learned.gshard import GShardRouter
from lightning_moevlm.model.routers.learned.noisy_top_k import NoisyTopKRouter
from lightning_moevlm.model.routers.learned.sigmoid_bias import SigmoidBiasRouter
from lightning_moevlm.model.routers.learned.sinkhorn import SinkhornRouter
from lightning_moevlm.model.routers.learned.soft import SoftRouter
from lightning_moevlm.model.routers.learned.top_k import TopKRouter
from lightning_moevlm.model.routers.learned.varying.long_tail import LongTailRouter
from lightning_moevlm.model.routers.learned.varying.relu import ReLURouter
from lightning_moevlm.model.routers.learned.varying.sequence_top_k import SequenceTopKRouter
from lightning_moevlm.model.routers.learned.varying.top_p import TopPRouter
from lightning_moevlm.model.routers.quantile_update import QuantileUpdate
from lightning_moevlm.model.routers.router import ExpertAxis, Router
from lightning_moevlm.model.routers.smebu import SMEBU
from lightning_moevlm.model.routers.unlearned.fixed import FixedRouter
from lightning_moevlm.model.routers.unlearned.hash import HashRouter
from lightning_moevlm.model.routers.unlearned.modality import ModalityRouter

__all__ = [
    "SMEBU",
    "CosineRouter",
    "EarlierChoices",
    "ExpertAxis",
    "ExpertChoiceRouter",
    "FixedRouter",
    "GShardRouter",
    "Gate",
    "GroupLimit",
    "GroupLimitedRouter",
    "HashRouter",
    "LongTailRouter",
    "ModalityRouter",
    "NoisyTopKRouter",
    "QuantileUpdate",
    "ReLURouter",
    "Router",
    "SequenceTopKRouter",
    "SigmoidBiasRouter",
    "SinkhornRouter",
    "SoftRouter",
    "TopKRouter",
    "TopPRouter",
]
