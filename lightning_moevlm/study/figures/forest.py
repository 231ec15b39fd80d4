"""Forest plot: the effect of every arm against the baseline, its deciding interval, and the seeds it is made of."""

from lightning_moevlm.study.effects import Effect, Verdict
from lightning_moevlm.study.figures.picture import Picture, looks, new_figure, png_of
from lightning_moevlm.study.results import StudyResult
from lightning_moevlm.study.tables import Table, effects_table, name_and_unit

_WORDS = {Verdict.BETTER: "better", Verdict.WORSE: "worse", Verdict.INCONCLUSIVE: "inconclusive"}


def draw_forest(result: StudyResult) -> Picture | None:
    """Draw it; None where no arm has been compared yet."""
    compared = [(a.arm.name, a.effect) for a in result.arms if a.effect and a.effect.differences]
    if not compared:
        return None
    study = result.study
    title, unit = name_and_unit(study.primary.metric)
    look = looks(tuple(a.arm.name for a in result.arms), study.baseline)
    figure = new_figure(1.5 + 0.55 * len(compared))
    axes = figure.subplots()
    axes.axvline(0.0, color="#222222", linewidth=1.2)
    for row, (name, effect) in enumerate(compared):
        colour, marker = look[name].colour, look[name].marker
        if effect.interval is not None:
            axes.plot([effect.interval.low, effect.interval.high], [row, row], color=colour, linewidth=2)
            for end in (effect.interval.low, effect.interval.high):
                axes.plot([end, end], [row - 0.12, row + 0.12], color=colour, linewidth=2)
        axes.plot(
            [sum(effect.differences) / len(effect.differences)],
            [row],
            marker=marker,
            markersize=9,
            color=colour,
            linestyle="none",
        )
        offsets = [row + 0.28] * len(effect.differences)
        axes.plot(
            effect.differences,
            offsets,
            "o",
            markersize=4.5,
            markerfacecolor="white",
            color=colour,
            linestyle="none",
        )
        word = _WORDS[effect.verdict]
        axes.annotate(
            word, (1.01, row), xycoords=("axes fraction", "data"), va="center", color=colour, weight="bold"
        )
    axes.set_yticks(range(len(compared)), [name for name, _ in compared])
    axes.set_ylim(len(compared) - 0.4, -0.6)
    side = "left" if study.primary.direction == "lower" else "right"
    axes.set_xlabel(
        f"{title}, arm minus {study.baseline}{f' ({unit})' if unit else ''}; {side} of 0 is better"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    level = f"{100 * (1 - study.decide.alpha):g} %"
    axes.set_title(f"mean and {level} interval; small circles: single seeds", fontsize=10)
    alt = f"Forest plot of the effect of each arm on {title}. " + " ".join(
        _sentence(n, e) for n, e in compared
    )
    return Picture("effects", f"Effect on {title}", alt, png_of(figure), _table(result))


def _sentence(name: str, effect: Effect) -> str:
    interval = f" [{effect.interval.low:+.4f}, {effect.interval.high:+.4f}]" if effect.interval else ""
    return f"{name}: {effect.mean:+.4f}{interval}, {_WORDS[effect.verdict]}."


def _table(result: StudyResult) -> Table:
    """Return the differences seed by seed; means and intervals stand in the main table."""
    seeds = result.study.seeds
    rows = []
    for arm in result.arms:
        if arm.effect is not None:
            by_seed = dict(zip(arm.effect.seeds, arm.effect.differences, strict=True))
            rows.append((arm.arm.name, *(f"{by_seed[s]:+.4f}" if s in by_seed else "–" for s in seeds)))
    return Table(
        f"{effects_table(result).title}, arm minus baseline",
        ("arm", *(f"seed {s}" for s in seeds)),
        tuple(rows),
    )
