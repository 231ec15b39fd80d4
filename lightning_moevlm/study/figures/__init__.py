"""The report's pictures, each with the sentence and the table that say the same."""

from lightning_moevlm.study.figures.bars import draw_accuracy, draw_throughput
from lightning_moevlm.study.figures.curves import draw_curves
from lightning_moevlm.study.figures.expert_load import draw_expert_load
from lightning_moevlm.study.figures.forest import draw_forest
from lightning_moevlm.study.figures.picture import Picture
from lightning_moevlm.study.results import StudyResult

__all__ = ["Picture", "draw_all"]

_DRAWERS = (draw_forest, draw_curves, draw_accuracy, draw_expert_load, draw_throughput)


def draw_all(result: StudyResult) -> list[Picture]:
    """Draw every picture that the study has data for."""
    return [picture for drawer in _DRAWERS if (picture := drawer(result)) is not None]
