"""Draws the loss of the arms around the event, over the steps of the run before it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_moevlm.study.forensics.replay.arms import UNCHANGED
from lightning_moevlm.study.forensics.replay.course import Course
from lightning_moevlm.study.report.figures.report_figure import INK, choose_looks, legend_columns, new_figure

_PAST_SHOWN = 24  # steps
_DOTS_PER_INCH = 130
_LETTERS = 60


def draw_replay(
    courses: Mapping[str, Course], past: Sequence[tuple[int, float]], step: int, title: str, file: Path
) -> None:
    """Write the picture as PNG.

    Args:
        courses: of the arms by name, the unchanged one among them.
        past: steps and losses of the run up to the checkpoint.
        step: step of the event.
        title: of the picture.
        file: to write.

    Raises:
        OSError: the file cannot be written.
    """
    looks = choose_looks(tuple(courses), UNCHANGED)
    columns = legend_columns([name[:_LETTERS] for name in courses])
    figure = new_figure(3.6 + 0.22 * -(-len(courses) // columns))
    axes = figure.subplots()
    shown = past[-_PAST_SHOWN:]
    if shown:
        axes.plot(*zip(*shown, strict=True), color=INK, linewidth=1.0, alpha=0.4)
        axes.axvline(shown[-1][0] + 0.5, color=INK, linewidth=0.8, alpha=0.4, linestyle=":")
    axes.axvline(step, color=INK, linewidth=0.8, linestyle="--", alpha=0.6)
    for name, course in courses.items():
        look = looks[name]
        axes.plot(
            [one.step for one in course.steps],
            [one.loss for one in course.steps],
            color=look.colour, marker=look.marker, markersize=4, linewidth=1.4, label=name[:_LETTERS],
            zorder=3 if name == UNCHANGED else 2,
        )  # fmt: skip
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("total loss")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
