"""The LightningModule."""

from lightning_moevlm.training.actions import Actions
from lightning_moevlm.training.evaluation import Evaluation
from lightning_moevlm.training.half_precision import RegionHalfPrecision
from lightning_moevlm.training.schedule_trial import try_schedule
from lightning_moevlm.training.vision_language_module import StepOutput, VisionLanguageModule

__all__ = ["Actions", "Evaluation", "RegionHalfPrecision", "StepOutput", "VisionLanguageModule", "try_schedule"]
