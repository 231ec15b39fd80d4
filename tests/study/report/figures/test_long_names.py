"""Long names in figures."""

import itertools

import pytest
from matplotlib.figure import Figure

from lightning_moevlm.study.report.figures import draw_all
from lightning_moevlm.study.report.figures import report_figure as drawing
from lightning_moevlm.study.report.figures.report_figure import legend_columns, new_figure
from tests.study.report.figures.test_figures import ended_at, loads, to_result


def test_long_names_stay_apart_and_within(tmp_path, monkeypatch):
    arms = {"baseline": None} | {
        f"expert_choice_with_capacity_per_modality_{i}": {"model.speed": i} for i in range(2, 21)
    }

    def series(run):
        return ended_at(5.0 + run.seed) | loads({"image": (0.75, 0.25), "text": (0.1, 0.9)})

    figures = []
    monkeypatch.setattr(drawing, "_render_svg", lambda figure: figures.append(figure) or b"<svg/>")
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figure.draw_without_rendering())
    names = [each.name for each in draw_all(to_result(tmp_path, {"arms": arms}, series))]
    for name, figure in zip(names, figures, strict=True):
        page = figure.bbox
        titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
        labels = [text for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label) if text.get_text()]
        for box in [*titles, *(label.get_window_extent() for label in labels)]:
            assert box.x0 >= 0 and box.x1 <= page.width, name
        assert not any(one.overlaps(two) for one, two in itertools.combinations(titles, 2)), name
        assert figure.get_figheight() <= 1.75 * figure.get_figwidth(), name  # a page of paper


@pytest.mark.parametrize(
    ("name", "letters", "lines"),
    [
        ("no_router_z", 28, ["no_router_z"]),
        ("sigmoid_bias_per_modality_recentred", 28, ["sigmoid_bias_per_modality_", "recentred"]),
        ("max_violation/block1/image", 15, ["max_violation/", "block1/image"]),
        ("a" * 40 + "_b", 28, ["a" * 40 + "_", "b"]),
        ("", 28, [""]),
    ],
)
def test_names_are_broken_where_they_allow_it(name, letters, lines):
    assert drawing.wrap(name, letters).split("\n") == lines
    assert "".join(lines) == name


@pytest.mark.parametrize(("longest", "columns"), [(4, 5), (20, 3), (64, 1)])
def test_legends_fit_the_width(longest, columns):
    names = ("a" * longest, *(f"arm_{i}"[:longest] for i in range(19)))
    assert legend_columns(names) == columns  # 90 letters beside each other, 7 of them for each mark
    figure = new_figure(4.0 + 0.25 * len(names) / columns)
    axes = figure.subplots()
    for name in names:
        axes.plot([0], [0], marker="o", label=name)
    legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
