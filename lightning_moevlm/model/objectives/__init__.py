"""Objectives: (backbone, batch) -> loss terms. They own their heads, because targets decide what a head predicts."""

from lightning_moevlm.model.objectives.answer_classification import AnswerClassification
from lightning_moevlm.model.objectives.classification import Classification
from lightning_moevlm.model.objectives.contrastive import Contrastive
from lightning_moevlm.model.objectives.draws import Draws
from lightning_moevlm.model.objectives.joint import Joint
from lightning_moevlm.model.objectives.masked_modelling import MaskedModelling
from lightning_moevlm.model.objectives.matching import Matching
from lightning_moevlm.model.objectives.next_token import NextToken
from lightning_moevlm.model.objectives.objective import Objective
from lightning_moevlm.model.objectives.targets.codebook_targets import CodebookTargets
from lightning_moevlm.model.objectives.targets.image_targets import ImageTargets, PixelTargets
from lightning_moevlm.model.objectives.targets.vq_targets import VQCheckpointTargets
from lightning_moevlm.model.objectives.visual_reasoning import VisualReasoning

__all__ = [
    "AnswerClassification",
    "Classification",
    "CodebookTargets",
    "Contrastive",
    "Draws",
    "ImageTargets",
    "Joint",
    "MaskedModelling",
    "Matching",
    "NextToken",
    "Objective",
    "PixelTargets",
    "VQCheckpointTargets",
    "VisualReasoning",
]
