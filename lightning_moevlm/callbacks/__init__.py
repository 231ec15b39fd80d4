"""Callbacks: telemetry, and guards that act."""

from lightning_moevlm.callbacks.divergence_guard import DivergenceGuard
from lightning_moevlm.callbacks.feature_writer import FeatureWriter
from lightning_moevlm.callbacks.float8_training import Float8Training
from lightning_moevlm.callbacks.last_checkpoint import LastCheckpoint
from lightning_moevlm.callbacks.liveness import Liveness
from lightning_moevlm.callbacks.precision_shadow import PrecisionShadow
from lightning_moevlm.callbacks.result_table import ResultTable
from lightning_moevlm.callbacks.step_clock import StepClock
from lightning_moevlm.callbacks.step_progress import StepProgress
from lightning_moevlm.callbacks.stop_by_signal import StopBySignal
from lightning_moevlm.callbacks.telemetry import Telemetry

__all__ = [
    "DivergenceGuard",
    "FeatureWriter",
    "Float8Training",
    "LastCheckpoint",
    "Liveness",
    "PrecisionShadow",
    "ResultTable",
    "StepClock",
    "StepProgress",
    "StopBySignal",
    "Telemetry",
]
