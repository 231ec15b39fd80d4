"""Shows effects as text and as plain values."""

from typing import Any

from lightning_moevlm.atlas.causal.effects import Effect
from lightning_moevlm.atlas.section import finite
from lightning_moevlm.study.report.tables.table import NOTHING


def show_effect(effect: Effect | None) -> str:
    """Return an effect with its interval."""
    if effect is None:
        return NOTHING
    interval = "" if effect.interval is None else f" [{effect.interval.low:+.3g}, {effect.interval.high:+.3g}]"
    return f"{effect.mean:+.3g}{interval}"


def effect_record(effect: Effect | None) -> dict[str, Any] | None:
    """Return an effect as plain values."""
    return None if effect is None else dict(zip(COLUMNS, effect_row(effect), strict=True))


COLUMNS = ("samples", "mean", "low", "high", "p", "p_adjusted")


def effect_row(effect: Effect) -> list[float | None]:
    """Return the values of `COLUMNS`."""
    low, high = (None, None) if effect.interval is None else (effect.interval.low, effect.interval.high)
    return [effect.num_samples, *(finite(each) for each in (effect.mean, low, high, effect.p, effect.p_adjusted))]
