"""Refuses numbers outside their range in one line; infinities and NaN are in no range."""

import math

from lightning_moevlm.common.errors import UserError


def check_number(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    advice: str = "",
) -> None:
    """Refuse a number that is not finite or outside its range.

    Args:
        name: of the option, as in a configuration.
        value: the option's.
        least: smallest value allowed, or
        above: largest value not allowed.
        most: largest value allowed, or
        below: smallest value not allowed.
        advice: end of the message with its first comma or semicolon: ", or null for none".

    Raises:
        UserError: names the value, the range, and the advice.
    """
    is_inside = (
        math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    if not is_inside:
        raise UserError(f"{name} is {value}: choose {_in_words(least, above, most, below)}{advice}")


def _in_words(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    if most is None and below is None:
        return f"{least} or more" if above is None else f"a value above {above}"
    low = f"from {least}" if above is None else f"above {above}"
    return f"a value {low} {f'up to {most}' if below is None else f'up to, not including, {below}'}"
