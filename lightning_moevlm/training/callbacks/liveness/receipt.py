"""What a switch has to show: a receipt, with a verdict and the number that it rests on.

    alive     it acts on this model and this batch: the evidence is by how much
    idle      it could act, which a trigger on a copy has shown, and has had no cause yet
    off       declared off at this step: weight 0, or routers that stand still by schedule; or nobody asked for it: a
              default with nothing here to act on
    unproven  it could not be asked here: sharded weights, a loss that is no number, a layer that did not run
    dead      it cannot act: the run must not go on as if it did

A switch is named by its option: `losses.router_z`, `stabilisers.qk_norm`, `gradient.clip_norm`.
"""

import math
from typing import Literal, NamedTuple

Verdict = Literal["alive", "idle", "off", "unproven", "dead"]
Kind = Literal["loss", "routing", "trunk", "gradient", "action", "precision"]


class Receipt(NamedTuple):
    """One switch, asked once.

    evidence: what was seen, with its number and unit. value: the number, for the curve of the switch; None where there
    is none. advice: of a dead switch, what to change.
    """

    switch: str
    kind: Kind
    verdict: Verdict
    evidence: str
    value: float | None = None
    advice: str = ""

    def told(self, step: int) -> str:
        """Return the receipt as one line; step: optimiser steps done when it was written."""
        return f"{self.verdict}: {self.evidence} (step {step})"

    @property
    def point(self) -> float | None:
        """The number for the curve; None where there is none, or one that is not finite."""
        return self.value if self.value is not None and math.isfinite(self.value) else None
