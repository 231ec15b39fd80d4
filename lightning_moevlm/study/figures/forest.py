"""Forest plot: the effect of every arm against the baseline, its deciding interval, and the seeds it is made of."""

from matplotlib.axes import Axes

from lightning_moevlm.study.comparison import Test
from lightning_moevlm.study.effects import Effect
from lightning_moevlm.study.figures.lost import lost_runs
from lightning_moevlm.study.figures.picture import (
    GROUND,
    INK,
    LETTERS_OF_ROW,
    Look,
    Picture,
    looks,
    new_figure,
    picture_of,
    wrapped,
)
from lightning_moevlm.study.results import ArmResult, StudyResult
from lightning_moevlm.study.table import Table, name_and_unit, signed
from lightning_moevlm.study.tables import effects_table

_LETTERS_BELOW = 50
_CENTRES: dict[Test, str] = {"t": "mean", "wilcoxon": "centre (Hodges-Lehmann)", "sign": "median"}


def draw_forest(result: StudyResult) -> Picture | None:
    """Draw it; None where no arm has been compared yet."""
    rows = [arm for arm in result.arms if arm.effect is not None]
    if not any(arm.effect and arm.effect.differences for arm in rows):
        return None
    study = result.comparison
    title, unit = name_and_unit(study.primary.metric)
    look = looks(tuple(arm.arm.name for arm in result.arms), study.baseline)
    figure = new_figure(1.5 + 0.55 * len(rows))
    axes = figure.subplots()
    axes.axvline(0.0, color=INK, linewidth=1.2)
    for row, arm in enumerate(rows):
        effect = arm.effect
        assert effect is not None
        _draw_row(axes, row, effect, look[arm.arm.name])
        word = "\n".join(dict.fromkeys([effect.word, *lost_runs(arm)]))
        axes.annotate(word, (1.01, row), xycoords=("axes fraction", "data"), va="center", weight="bold")
    axes.set_yticks(range(len(rows)), [wrapped(arm.arm.name, LETTERS_OF_ROW) for arm in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    side = "left" if study.primary.direction == "lower" else "right"
    told = f"{title}, arm minus {study.baseline}{f' ({unit})' if unit else ''}; {side} of 0 is better"
    axes.set_xlabel(wrapped(told, _LETTERS_BELOW))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    level = f"{100 * (1 - study.decide.alpha):g} %"
    axes.set_title(f"{_CENTRES[study.decide.test]} and {level} interval; small circles: single seeds", fontsize=10)
    alt = f"Forest plot of the effect of each arm on {title}. " + " ".join(_sentence(arm) for arm in rows)
    return picture_of(figure, "effects", f"Effect on {title}", alt, _table(result))


def _draw_row(axes: Axes, row: int, effect: Effect, look: Look) -> None:
    if effect.centre is None:
        return
    if effect.interval is not None:
        ends = (effect.interval.low, effect.interval.high)
        axes.plot(ends, (row, row), color=look.colour, linewidth=2)
        for end in ends:
            axes.plot((end, end), (row - 0.12, row + 0.12), color=look.colour, linewidth=2)
    axes.plot([effect.centre], [row], marker=look.marker, markersize=9, color=look.colour)
    below = [row + 0.28] * len(effect.differences)
    axes.plot(effect.differences, below, "o", markersize=4.5, markerfacecolor=GROUND, color=look.colour)


def _sentence(arm: ArmResult) -> str:
    effect = arm.effect
    assert effect is not None
    if effect.centre is None:
        return f"{arm.arm.name}: {effect.note}."
    interval = f" [{signed(effect.interval.low)}, {signed(effect.interval.high)}]" if effect.interval else ""
    return f"{arm.arm.name}: {signed(effect.centre)}{interval}, {effect.word}."


def _table(result: StudyResult) -> Table:
    """Return the differences seed by seed; means and intervals stand in the main table."""
    seeds = result.comparison.seeds
    rows = []
    for arm in result.arms:
        if arm.effect is not None:
            by_seed = dict(zip(arm.effect.seeds, arm.effect.differences, strict=True))
            rows.append((arm.arm.name, *(signed(by_seed[s]) if s in by_seed else "–" for s in seeds)))
    return Table(
        f"{effects_table(result).title}, arm minus baseline",
        ("arm", *(f"seed {s}" for s in seeds)),
        tuple(rows),
    )
