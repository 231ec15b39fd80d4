"""The result of asking a switch for its proof: a receipt, with a verdict and the number that it rests on.

    alive     it acts on this model and this batch; the evidence says by how much
    idle      it can act, as a trigger on a copy has shown, but has had no cause yet
    off       declared off at this step: weight 0, or routers frozen by schedule; or a default with nothing to act on
    unproven  it could not be asked here: sharded weights, a loss that is not finite, a layer that did not run
    dead      it cannot act: the run must not continue

A switch is named by its option: `losses.router_z`, `stabilisers.qk_norm`, `gradient.clip_norm`.
"""

import math
from typing import Literal, NamedTuple

Verdict = Literal["alive", "idle", "off", "unproven", "dead"]
Kind = Literal["loss", "routing", "trunk", "gradient", "action", "precision"]


class Receipt(NamedTuple):
    """One switch, asked once."""

    switch: str
    kind: Kind
    verdict: Verdict
    evidence: str
    """What was measured, with number and unit."""
    value: float | None = None
    """The number, for the curve of the switch."""
    advice: str = ""
    """The change to make, if the switch is dead."""

    def describe(self, step: int) -> str:
        """Return the receipt as one line; step: optimiser steps done when it was written."""
        return f"{self.verdict}: {self.evidence} (step {step})"

    @property
    def point(self) -> float | None:
        """The number for the curve; None if there is none or it is not finite."""
        return self.value if self.value is not None and math.isfinite(self.value) else None


class Switch(NamedTuple):
    """An option that is asked; makes its receipts."""

    name: str
    kind: Kind

    def is_(self, verdict: Verdict, evidence: str, value: float | None = None) -> Receipt:
        """Return the receipt of a switch that may stay."""
        return Receipt(self.name, self.kind, verdict, evidence, value)

    def dead(self, evidence: str, advice: str, value: float | None = None) -> Receipt:
        """Return the receipt that ends the run."""
        return Receipt(self.name, self.kind, "dead", evidence, value, advice)
