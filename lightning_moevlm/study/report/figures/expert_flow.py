"""Draws bands from each modality to the experts that took its tokens at the end of training.

A band is as wide as its share of the modality's kept pairs. If modalities share one mixture, their bands meet at the
same expert; else each has its own experts. As in the heatmaps, the first seed with data is shown.
"""

import re
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from lightning_moevlm.study.compare.results import ArmResult, RunResult, StudyResult
from lightning_moevlm.study.report.figures.expert_load import find_run_with_load, read_loads
from lightning_moevlm.study.report.figures.report_figure import INK, ReportFigure, new_figure, render_figure, wrap
from lightning_moevlm.study.report.figures.unfinished_runs import describe_unfinished_runs
from lightning_moevlm.study.report.tables.table import Table, format_percent

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_GAP = 0.02  # between modalities and between experts, of the panel's height
_LEGIBLE = 0.03  # of the panel's height: a lower expert gets no number
_APART = 0.085  # of the panel's height: nearer numbers would hide each other
_LEFT, _RIGHT, _THICK = 0.0, 1.0, 0.03
_DISPATCH = "dispatch/"
_FEW_ARMS = 5  # more stand beside each other as well
_PANELS_BESIDE = 4
_LETTERS_ABOVE = 60  # of a row's panels, together
_LARGEST = 3  # the sentence names the fullest experts alone

Flow = Mapping[str, tuple[float, ...]]
"""Share of each modality's kept pairs, by expert."""


def draw_expert_flow(result: StudyResult) -> ReportFigure | None:
    """Draw the flow; None if no arm has experts."""
    shown = [(arm, run) for arm in result.arms if (run := find_run_with_load(arm)) is not None]
    blocks = sorted({block for _, run in shown for block in read_flows(run)})
    if not blocks:
        return None
    beside = 1 if len(shown) <= _FEW_ARMS else max(1, _PANELS_BESIDE // len(blocks))
    num_rows = -(-len(shown) // beside)
    figure = new_figure(0.4 + (1.5 if beside == 1 else 1.3) * num_rows)
    grid = figure.subplots(num_rows, beside * len(blocks), squeeze=False)
    for axes in grid[-1][len(blocks) * (len(shown) - beside * (num_rows - 1)) :]:
        axes.remove()
    modalities = tuple(dict.fromkeys(m for _, run in shown for flow in read_flows(run).values() for m in flow))
    colours = {modality: _COLOURS[i % len(_COLOURS)] for i, modality in enumerate(sorted(modalities))}
    letters = _LETTERS_ABOVE // (beside * len(blocks))
    for place, (arm, run) in enumerate(shown):
        flows = read_flows(run)
        row, left = divmod(place, beside)
        heading = "\n".join([wrap(arm.arm.name, letters), *(f"({words})" for words in describe_unfinished_runs(arm))])
        for column, block in enumerate(blocks):
            axes = grid[row][left * len(blocks) + column]
            axes.set_axis_off()
            axes.set_xlim(-0.2, 1.14)
            axes.set_ylim(1.02, -0.02)
            axes.set_title(f"{heading}, block {block}", fontsize=8)
            if block in flows:
                _draw(axes, flows[block], colours, shares_experts(run.tags, block))
            else:
                axes.text(0.5, 0.5, "no experts", ha="center", va="center")
    title = "Which experts each modality's tokens go to, at the end of training"
    sentences = " ".join(_sentence(arm, run) for arm, run in shown)
    alt = f"Flow diagrams, one per arm and block, bands from modalities to experts. {sentences}"
    return render_figure(figure, "expert_flow", title, alt, _table(shown))


def read_flows(run: RunResult) -> dict[int, Flow]:
    """Return the shares at the last logged step, by block."""
    flows: dict[int, dict[str, tuple[float, ...]]] = {}
    for (block, modality), (_, load) in sorted(read_loads(run).items()):
        flows.setdefault(block, {})[modality] = tuple(float(share) for share in np.nan_to_num(load[:, -1]))
    return dict(flows)


def shares_experts(tags: Mapping[str, str], block: int) -> bool:
    """Return whether modalities share a block's experts: its run has tagged one mixture in it, not several."""
    layers = [tag for tag in tags if tag.startswith(_DISPATCH) and re.search(rf"(^|\.){block}\.", tag)]
    return len(layers) == 1


def _draw(axes: Axes, flow: Flow, colours: Mapping[str, str], is_shared: bool) -> None:
    """Draw one panel; y goes from 0 at the top to 1."""
    flow = {modality: tuple(max(0.0, share) for share in shares) for modality, shares in flow.items()}
    part = (1 - _GAP * (len(flow) - 1)) / len(flow)  # height of a modality
    groups = [tuple(flow)] if is_shared else [(modality,) for modality in flow]
    num_experts = sum(max(len(flow[modality]) for modality in group) for group in groups)
    scale = (1 - _GAP * (num_experts - 1) / 2) / len(flow)  # of the experts' side, with narrower gaps
    right, last_number = 0.0, -1.0
    lefts = {modality: i * (part + _GAP) for i, modality in enumerate(flow)}
    for modality, top in lefts.items():
        axes.add_patch(Rectangle((_LEFT - _THICK, top), _THICK, part, color=colours[modality], linewidth=0))
        axes.text(_LEFT - 2 * _THICK, top + part / 2, modality, ha="right", va="center", fontsize=8)
    for group in groups:
        for expert in range(max(len(flow[modality]) for modality in group)):
            top = right
            for modality in group:
                share = flow[modality][expert] if expert < len(flow[modality]) else 0.0
                if share > 0:
                    ends = (lefts[modality], lefts[modality] + share * part), (right, right + share * scale)
                    axes.add_patch(_band(*ends, colours[modality]))
                    lefts[modality] += share * part
                    right += share * scale
            height = right - top
            axes.add_patch(Rectangle((_RIGHT, top), _THICK, height, color=INK, linewidth=0, alpha=0.8))
            if height >= _LEGIBLE and top + height / 2 - last_number >= _APART:
                last_number = top + height / 2
                axes.text(_RIGHT + 2 * _THICK, last_number, str(expert), va="center", fontsize=7)
            right += _GAP / 2


def _band(left: tuple[float, float], right: tuple[float, float], colour: str) -> PathPatch:
    middle = (_LEFT + _RIGHT) / 2
    upper = [(_LEFT, left[0]), (middle, left[0]), (middle, right[0]), (_RIGHT, right[0])]
    lower = [(_RIGHT, right[1]), (middle, right[1]), (middle, left[1]), (_LEFT, left[1])]
    curve = [Path.CURVE4] * 3
    return PathPatch(
        Path(upper + lower, [Path.MOVETO, *curve, Path.LINETO, *curve]), facecolor=colour, alpha=0.45, lw=0
    )


def _sentence(arm: ArmResult, run: RunResult) -> str:
    parts = []
    for block, flow in read_flows(run).items():
        for modality, shares in flow.items():
            fullest = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:_LARGEST]
            experts = ", ".join(f"expert {expert} {format_percent(shares[expert])}" for expert in fullest)
            parts.append(f"block {block} {modality} most to {experts}")
    return f"{arm.arm.name}: {'; '.join(parts)}."


def _table(shown: list[tuple[ArmResult, RunResult]]) -> Table:
    flows = [
        (arm.arm.name, run, block, modality, shares)
        for arm, run in shown
        for block, flow in read_flows(run).items()
        for modality, shares in flow.items()
    ]
    num_experts = max(len(shares) for *_, shares in flows)
    rows = tuple(
        (
            name,
            f"seed {run.seed}",
            f"block {block}",
            modality,
            "shared" if shares_experts(run.tags, block) else "own",
            *(format_percent(shares[e]) if e < len(shares) else "" for e in range(num_experts)),
        )
        for name, run, block, modality, shares in flows
    )
    columns = ("arm", "run", "block", "modality", "experts", *(f"expert {e}" for e in range(num_experts)))
    return Table("Share of each modality's kept pairs by expert, at the last logged step", columns, rows)
