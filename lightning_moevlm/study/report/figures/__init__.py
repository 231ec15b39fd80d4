"""Draws the report's figures, each with a sentence and a table of the same content."""

import dataclasses
import math

import matplotlib

from lightning_moevlm.study.compare.results import ArmResult, StudyResult
from lightning_moevlm.study.report.figures.bars import draw_accuracy, draw_throughput
from lightning_moevlm.study.report.figures.curves import draw_curves
from lightning_moevlm.study.report.figures.expert_flow import draw_expert_flow
from lightning_moevlm.study.report.figures.expert_load import draw_expert_load
from lightning_moevlm.study.report.figures.forest import draw_factor_forest, draw_forest
from lightning_moevlm.study.report.figures.interactions import draw_interactions
from lightning_moevlm.study.report.figures.learning_rates import draw_learning_rates
from lightning_moevlm.study.report.figures.pareto import draw_pareto
from lightning_moevlm.study.report.figures.report_figure import ReportFigure
from lightning_moevlm.study.report.figures.spike_timeline import draw_spikes

__all__ = ["MANY_ARMS", "ReportFigure", "draw_all", "select_legible"]

_DRAWERS = (
    draw_factor_forest,
    draw_interactions,
    draw_forest,
    draw_learning_rates,
    draw_curves,
    draw_accuracy,
    draw_spikes,
    draw_expert_load,
    draw_expert_flow,
    draw_pareto,
    draw_throughput,
)
MANY_ARMS = 20


def draw_all(result: StudyResult) -> list[ReportFigure]:
    """Draw every figure that the study has data for, with as many arms as are legible."""
    few = select_legible(result)
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
        return [figure for drawer in _DRAWERS if (figure := drawer(few)) is not None]


def select_legible(result: StudyResult) -> StudyResult:
    """Return the study with at most `MANY_ARMS` arms: the baseline and those furthest from it, in the file's order."""
    if len(result.arms) <= MANY_ARMS:
        return result

    def distance(arm: ArmResult) -> float:
        if arm.arm.name == result.comparison.baseline:
            return math.inf
        return abs(arm.effect.centre) if arm.effect and arm.effect.centre is not None else -1.0

    kept = {arm.arm.name for arm in sorted(result.arms, key=distance, reverse=True)[:MANY_ARMS]}
    return dataclasses.replace(result, arms=tuple(arm for arm in result.arms if arm.arm.name in kept))
