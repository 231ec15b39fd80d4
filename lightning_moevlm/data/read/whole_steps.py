"""Makes epochs of whole optimiser steps, so that every step has equally many batches.

Lightning takes a step on the last batch of an epoch, even if fewer batches have accumulated. Such a step has fewer
samples, weighs them differently, and gives the arms of a study unequal numbers of samples.
"""

from lightning_moevlm.common.errors import UserError


def whole_steps(num_batches: int, per_step: int) -> int:
    """Return the batches of an epoch of whole steps: those available, rounded down, but at least one step."""
    return max(per_step, num_batches - num_batches % per_step) if num_batches else 0


def refuse_smaller_step(num_batches: float, per_step: int, option: str) -> None:
    """Refuse epochs whose last step would be smaller than the others; infinite epochs have no last step.

    Args:
        num_batches: Batches of an epoch, per rank.
        per_step: Batches per optimiser step.
        option: Option that sets the length of an epoch, with its value.

    Raises:
        UserError: with numbers that divide.
    """
    if num_batches == float("inf") or num_batches % per_step == 0:
        return
    batches = int(num_batches)
    down, up = batches - batches % per_step, batches - batches % per_step + per_step
    divisors = [str(number) for number in range(1, batches + 1) if batches % number == 0]
    raise UserError(
        f"{option} makes epochs of {batches} batches, and trainer.accumulate_grad_batches is {per_step}: the last "
        f"optimiser step of every epoch would have {batches % per_step} batches. Give an epoch "
        f"{f'{down} or {up}' if down else up} batches, or accumulate over {_either(divisors)}"
    )


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
