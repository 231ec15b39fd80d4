"""Several sources in one stream of batches, by weight.

Of a batch of B samples source k gives

    count_k = floor(C_k B + u) - floor(C_{k-1} B + u)        C_k = (w_1 + ... + w_k) / (w_1 + ... + w_n)

which is its share of B to within one sample (systematic sampling). u moves by the golden ratio from batch to batch, so
that what a source has given by batch b differs from its share by a few samples however large b is, and it is the same
on every rank, so that ranks have the same modalities and about the same work in every step. Weights may change while
training runs; counts follow from the number of the batch and the optimiser step alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.contracts.schedules import Ramp, Schedule, value_at

Modality = Literal["pair", "image", "text"]
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Pause:
    """A time in which a source gives nothing.

    Args:
        begin: optimiser steps done when it begins.
        num_steps: optimiser steps that it lasts.
    """

    begin: int
    num_steps: int

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            if count < 0:
                raise UserError(f"{name} of a pause is {count}: give a number of optimiser steps, 0 or more")


@dataclass(frozen=True)
class Source:
    """A set of shards in a mixture.

    Args:
        root: where the set lies.
        weight: of this source among all, by samples: a number of 0 or more, or a ramp over optimiser steps.
        modality: "pair", "image" (its images alone), "text" (its texts alone); null takes what the set has.
        pause: a time in which it gives nothing; null for none.
    """

    root: str
    weight: Schedule = 1.0
    modality: Modality | None = None
    pause: Pause | None = None

    def __post_init__(self) -> None:
        ends = (self.weight.start, self.weight.stop) if isinstance(self.weight, Ramp) else (self.weight,)
        if min(ends) < 0:
            raise UserError(f"the weight of source {mask_url_secrets(self.root)} is {self.weight}: give 0 or more")

    def weight_at(self, step: int) -> float:
        """Return the weight when `step` optimiser steps are done."""
        dry = self.pause is not None and 0 <= step - self.pause.begin < self.pause.num_steps
        return 0.0 if dry else value_at(self.weight, step)

    @property
    def change_steps(self) -> set[int]:
        """The steps from which on the weight may be 0 when it was not before."""
        found = {0}
        if isinstance(self.weight, Ramp):
            found.add(self.weight.begin + self.weight.num_steps)
        if self.pause is not None:
            found.add(self.pause.begin)
        return found


@dataclass(frozen=True)
class StepClock:
    """How batches make optimiser steps: `batches_per_epoch` of a rank, of which `batches_per_step` make one."""

    batches_per_epoch: int
    batches_per_step: int = 1

    def step(self, epoch: int, batch: int) -> int:
        """Return the optimiser steps done before a batch; an epoch is of whole steps."""
        return (epoch * self.batches_per_epoch + batch) // self.batches_per_step


@dataclass(frozen=True)
class Mixture:
    """Who gives how much to which batch.

    Raises:
        UserError: if there is a step at which every weight is 0.
    """

    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        for step in sorted(set[int]().union(*(source.change_steps for source in self.sources))):
            if not any(source.weight_at(step) for source in self.sources):
                raise UserError(
                    f"every source of the mixture has weight 0 after {step} optimiser steps: give one a weight, or let "
                    "pauses not overlap"
                )

    @property
    def changes(self) -> bool:
        """Whether counts depend on the optimiser step."""
        return any(isinstance(source.weight, Ramp) or source.pause is not None for source in self.sources)

    def counts(self, epoch: int, batch: int, batch_size: int, clock: StepClock) -> tuple[int, ...]:
        """Return how many samples each source gives to a batch."""
        step = clock.step(epoch, batch)
        offset = (0.5 + (epoch * clock.batches_per_epoch + batch) * _GOLDEN) % 1.0
        return counts([source.weight_at(step) for source in self.sources], batch_size, offset)


def counts(weights: Sequence[float], batch_size: int, offset: float) -> tuple[int, ...]:
    """Share out a batch in proportion to weights, each share rounded down or up; offset, in [0, 1), says which."""
    total, last = sum(weights), max(k for k, weight in enumerate(weights) if weight)
    reached, found, done = 0.0, [], 0
    for k, weight in enumerate(weights):
        reached += weight
        # past the last source that gives, rounding must not leave a sample over
        upto = batch_size if k >= last else floor(reached / total * batch_size + offset)
        found.append(min(upto, batch_size) - done if weight else 0)
        done += found[-1]
    return tuple(found)


def refuse_invalid_names(names: Sequence[str]) -> None:
    """Refuse names that cannot stand in metric keys.

    Raises:
        UserError: with what is allowed.
    """
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"source {name!r} of data.sources: a name is of letters, digits, '_', '.' and '-'")
