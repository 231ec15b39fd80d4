"""Computes the sensitivity to the learning rate. Source: Wortsman et al. 2023 (arXiv 2309.14322), section 2.

    sensitivity = mean over eta of ( min(loss(eta), loss_0) - loss* )

over the learning rates eta of a ladder, loss_0 the untrained model's loss, loss* the best of the ladder. Lower is
better, in the unit of the loss. A model that never learns has sensitivity 0, and the best learning rate may lie outside
of the ladder, so read it beside the losses.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_moevlm.study.plan.run_identity import flatten_without_seeds

_BEGUN_NUMBER = re.compile(r"[_.-]*(\d[0-9e_.-]*)?$")  # at the end of what names share: that of the rate
LEARNING_RATE = ("model", "optimizer", "init_args", "lr")


@dataclass(frozen=True)
class Ladder:
    """Arms that differ in the learning rate alone."""

    rungs: Mapping[float, str]
    """Arm by learning rate, ascending."""
    twins: Mapping[str, str] = field(default_factory=dict)
    """Arms that are left out: each has the learning rate of the other arm."""

    @property
    def name(self) -> str:
        """The common start of the arms' names, else the first arm's name."""
        names = list(self.rungs.values())
        common = "".join(a for a, *rest in zip(*names, strict=False) if all(a == b for b in rest))
        cut = next((i for i, (a, *rest) in enumerate(zip(*names, strict=False)) if any(a != b for b in rest)), None)
        return _BEGUN_NUMBER.sub("", common if cut is None else names[0][:cut]) or names[0]


def find_ladders(configs: Mapping[str, Mapping[str, object]]) -> tuple[Ladder, ...]:
    """Return every group of at least two arms whose configs differ in the learning rate alone, seeds aside.

    Args:
        configs: The resolved config of one run of each arm.
    """
    groups: dict[tuple[tuple[str, str], ...], dict[float, str]] = {}
    twins: dict[str, str] = {}
    for arm, config in configs.items():
        rate, rest = _without_rate(config)
        if rate is not None:
            rungs = groups.setdefault(tuple(flatten_without_seeds(rest).items()), {})
            if rungs.setdefault(rate, arm) != arm:
                twins[arm] = rungs[rate]
    return tuple(
        Ladder(dict(sorted(rungs.items())), {arm: one for arm, one in twins.items() if one in rungs.values()})
        for rungs in groups.values()
        if len(rungs) > 1
    )


def sensitivity(losses: Mapping[float, float], untrained: float) -> float | None:
    """Return the learning-rate sensitivity of one seed.

    Args:
        losses: Final loss by learning rate; a non-finite one (the run diverged) counts as the untrained loss.
        untrained: loss_0.
    """
    capped = [min(loss, untrained) if math.isfinite(loss) else untrained for loss in losses.values()]
    if not capped or not math.isfinite(untrained):
        return None
    return sum(capped) / len(capped) - min(capped)


def largest_stable(stable: Mapping[float, bool]) -> float | None:
    """Return the largest learning rate up to which every run was stable; None if the least one was not."""
    largest = None
    for rate in sorted(stable):
        if not stable[rate]:
            break
        largest = rate
    return largest


def _without_rate(resolved: Mapping[str, object]) -> tuple[float | None, dict[str, object]]:
    """Return a config's learning rate, and a copy of the config without it."""
    rest: dict[str, object] = dict(resolved)
    here = rest
    for part in LEARNING_RATE[:-1]:
        inner = here.get(part)
        if not isinstance(inner, dict):
            return None, rest
        copied = dict(inner)
        here[part] = copied
        here = copied
    rate = here.pop(LEARNING_RATE[-1], None)
    return (float(rate) if isinstance(rate, (int, float)) else None), rest
