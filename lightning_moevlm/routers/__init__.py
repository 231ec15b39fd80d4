"""Who goes where: routers turn tokens into plans and know no expert, loss, metric or config."""

from lightning_moevlm.routers.by_modality import ModalityRouter
from lightning_moevlm.routers.controls import FixedRouter
from lightning_moevlm.routers.cosine import CosineRouter
from lightning_moevlm.routers.expert_choice import ExpertChoiceRouter
from lightning_moevlm.routers.gate import Gate
from lightning_moevlm.routers.group_limit import GroupLimit
from lightning_moevlm.routers.group_limited import GroupLimitedRouter
from lightning_moevlm.routers.gshard import GShardRouter
from lightning_moevlm.routers.hashed import HashRouter
from lightning_moevlm.routers.noisy_top_k import NoisyTopKRouter
from lightning_moevlm.routers.relu import ReLURouter
from lightning_moevlm.routers.router import ExpertAxis, Router
from lightning_moevlm.routers.sigmoid_bias import SigmoidBiasRouter
from lightning_moevlm.routers.sinkhorn import SinkhornRouter
from lightning_moevlm.routers.soft import SoftRouter
from lightning_moevlm.routers.top_k import TopKRouter
from lightning_moevlm.routers.top_p import TopPRouter

__all__ = [
    "CosineRouter",
    "ExpertAxis",
    "ExpertChoiceRouter",
    "FixedRouter",
    "GShardRouter",
    "Gate",
    "GroupLimit",
    "GroupLimitedRouter",
    "HashRouter",
    "ModalityRouter",
    "NoisyTopKRouter",
    "ReLURouter",
    "Router",
    "SigmoidBiasRouter",
    "SinkhornRouter",
    "SoftRouter",
    "TopKRouter",
    "TopPRouter",
]
