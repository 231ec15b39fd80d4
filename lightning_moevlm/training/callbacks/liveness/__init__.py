"""Switches that are on prove that they act, in each run."""

from lightning_moevlm.training.callbacks.liveness.callback import Liveness
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt

__all__ = ["Liveness", "Receipt"]
