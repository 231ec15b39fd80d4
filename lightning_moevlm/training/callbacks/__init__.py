"""Callbacks: telemetry, proofs of switches, stops, checkpoints."""

from lightning_moevlm.training.callbacks.feature_writer import FeatureWriter
from lightning_moevlm.training.callbacks.float8_training import Float8Training
from lightning_moevlm.training.callbacks.liveness import Liveness
from lightning_moevlm.training.callbacks.recording.flight_recorder import FlightRecorder
from lightning_moevlm.training.callbacks.result_table import ResultTable
from lightning_moevlm.training.callbacks.routing.precision_shadow import PrecisionShadow
from lightning_moevlm.training.callbacks.routing.router_saturation import RouterSaturation
from lightning_moevlm.training.callbacks.step_progress import StepProgress
from lightning_moevlm.training.callbacks.step_times import StepTimes
from lightning_moevlm.training.callbacks.stopping.divergence_guard import DivergenceGuard
from lightning_moevlm.training.callbacks.stopping.last_checkpoint import LastCheckpoint
from lightning_moevlm.training.callbacks.stopping.stop_by_signal import StopBySignal
from lightning_moevlm.training.callbacks.tasks.answer_scores import AnswerScores
from lightning_moevlm.training.callbacks.tasks.caption_scores import CaptionScores
from lightning_moevlm.training.callbacks.tasks.label_probes import LabelProbes
from lightning_moevlm.training.callbacks.tasks.unigram_perplexity import UnigramPerplexity
from lightning_moevlm.training.callbacks.tasks.zero_shot import ZeroShot
from lightning_moevlm.training.callbacks.telemetry import Telemetry

__all__ = [
    "AnswerScores",
    "CaptionScores",
    "DivergenceGuard",
    "FeatureWriter",
    "FlightRecorder",
    "Float8Training",
    "LabelProbes",
    "LastCheckpoint",
    "Liveness",
    "PrecisionShadow",
    "ResultTable",
    "RouterSaturation",
    "StepProgress",
    "StepTimes",
    "StopBySignal",
    "Telemetry",
    "UnigramPerplexity",
    "ZeroShot",
]
