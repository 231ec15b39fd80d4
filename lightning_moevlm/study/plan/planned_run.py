"""One arm with one seed, and the plan that holds them all."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moevlm.study.declare.comparison import Comparison
from lightning_moevlm.study.declare.study_file import Study

if TYPE_CHECKING:  # it lies beside the models, which import torch
    from lightning_moevlm.contracts.model_card import ModelCard


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed.

    overrides: nested config that goes over the base; resolved: the whole config, for reading only (what is cosmetic may
    be another seed's); digest: identity, 12 hex digits; max_steps: optimiser steps, None where the clock ends the
    run.
    """

    study: str
    arm: str
    seed: int
    overrides: dict[str, Any]
    resolved: dict[str, Any]
    digest: str
    max_steps: int | None

    @property
    def name(self) -> str:
        """Name in the tracker and in tables."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def folder(self) -> str:
        """Name of its folder; a changed config gets a new one."""
        return f"{self.name}-{self.digest}"


@dataclass(frozen=True)
class Plan:
    """Every run of a study, seeds innermost, and the model card of each arm."""

    study: Study
    folder: Path
    runs: tuple[PlannedRun, ...]
    cards: "dict[str, ModelCard]"

    @property
    def comparison(self) -> Comparison:
        """What the study compares."""
        return self.study.comparison

    def run_folder(self, run: PlannedRun) -> Path:
        """Where a run keeps its state, log and checkpoints."""
        return self.folder / run.folder


def tracker_tags(run: PlannedRun) -> dict[str, str]:
    """Return the tags by which a run is found again in the tracker."""
    return {"sweep": run.study, "arm": run.arm, "seed": str(run.seed), "digest": run.digest}
