"""Records of planned runs: one arm with one seed, and the plan that holds them all."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moevlm.study.declare.comparison import Comparison
from lightning_moevlm.study.declare.study_file import Study

if TYPE_CHECKING:  # it lies beside the models, which import torch
    from lightning_moevlm.contracts.model_card import ModelCard


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed."""

    study: str
    arm: str  # name of the arm
    seed: int
    overrides: dict[str, Any]  # nested config over the base
    resolved: dict[str, Any]  # the whole config, for reading only (cosmetic keys may be those of another seed)
    digest: str  # identity, 12 hex digits
    max_steps: int | None  # optimiser steps; None with a budget of minutes

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
        """Arms, seeds and rules of the study."""
        return self.study.comparison

    def run_folder(self, run: PlannedRun) -> Path:
        """Return the folder of a run's state, log and checkpoints."""
        return self.folder / run.folder


def tracker_tags(run: PlannedRun) -> dict[str, str]:
    """Return the tags by which a run is found in the tracker."""
    return {"sweep": run.study, "arm": run.arm, "seed": str(run.seed), "digest": run.digest}
