"""Checks in each run that every enabled switch has an effect."""

from lightning_moevlm.training.callbacks.liveness.callback import Liveness
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt

__all__ = ["Liveness", "Receipt"]
