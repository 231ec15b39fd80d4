"""Mixes several sources in one stream of batches, by weight.

Of a batch of B samples source k gives

    count_k = floor(C_k B + u) - floor(C_{k-1} B + u)        C_k = (w_1 + ... + w_k) / (w_1 + ... + w_n)

which is its share of B to within one sample (systematic sampling). u moves by the golden ratio from batch to batch, so
the samples of a source by batch b differ from its share by a few samples for any b. It is the same on every rank, so
ranks have the same modalities and about equal work in every step. Weights may change in training. Counts depend on the
batch number and the optimiser step alone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.contracts.schedules import Ramp, Schedule, value_at

Modality = Literal["pair", "image", "text"]
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Pause:
    """A time in which a source gives no samples.

    Args:
        begin: Optimiser steps before it.
        num_steps: Its length in optimiser steps.
    """

    begin: int
    num_steps: int

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            check_number(f"{name} of a pause", count, least=0, advice=" optimiser steps")


@dataclass(frozen=True)
class Source:
    """A set of shards in a mixture.

    Args:
        root: Folder or address of the set.
        weight: Share of the samples relative to the other weights: 0 or more, or a ramp over optimiser steps.
        modality: `pair`, `image` (its images alone) or `text` (its texts alone); null takes all that the set has.
        pause: Optimiser steps during which it gives no samples; null is off.
        annotation: As data.annotation, which null takes.
        second_image: As data.second_image, which null takes.
    """

    root: str
    weight: Schedule = 1.0
    modality: Modality | None = None
    pause: Pause | None = None
    annotation: str | None = None
    second_image: str | None = None

    def __post_init__(self) -> None:
        ends = (self.weight.start, self.weight.stop) if isinstance(self.weight, Ramp) else (self.weight,)
        if min(ends) < 0:
            raise UserError(f"the weight of source {mask_url_secrets(self.root)} is {self.weight}: give 0 or more")

    def weight_at(self, step: int) -> float:
        """Return the weight after `step` optimiser steps."""
        pauses = self.pause is not None and 0 <= step - self.pause.begin < self.pause.num_steps
        return 0.0 if pauses else value_at(self.weight, step)

    @property
    def change_steps(self) -> set[int]:
        """Steps at which the weight may become 0."""
        found = {0}
        if isinstance(self.weight, Ramp):
            found.add(self.weight.begin + self.weight.num_steps)
        if self.pause is not None:
            found.add(self.pause.begin)
        return found


@dataclass(frozen=True)
class StepClock:
    """Converts batch numbers to optimiser steps."""

    batches_per_epoch: int  # of a rank
    batches_per_step: int = 1

    def step(self, epoch: int, batch: int) -> int:
        """Return the optimiser steps before a batch; epochs consist of whole steps."""
        return (epoch * self.batches_per_epoch + batch) // self.batches_per_step


@dataclass(frozen=True)
class Mixture:
    """Decides how many samples each source gives to a batch.

    Raises:
        UserError: if all weights are 0 at some step.
    """

    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        for step in sorted(set[int]().union(*(source.change_steps for source in self.sources))):
            if not any(source.weight_at(step) for source in self.sources):
                raise UserError(
                    f"every source of the mixture has weight 0 after {step} optimiser steps: give one a weight, or "
                    "separate the pauses"
                )

    @property
    def changes(self) -> bool:
        """Whether counts depend on the optimiser step."""
        return any(isinstance(source.weight, Ramp) or source.pause is not None for source in self.sources)

    def counts(self, epoch: int, batch: int, batch_size: int, clock: StepClock) -> tuple[int, ...]:
        """Return the number of samples of each source in a batch."""
        step = clock.step(epoch, batch)
        offset = (0.5 + (epoch * clock.batches_per_epoch + batch) * _GOLDEN) % 1.0
        return counts([source.weight_at(step) for source in self.sources], batch_size, offset)


def counts(weights: Sequence[float], batch_size: int, offset: float) -> tuple[int, ...]:
    """Divide a batch in proportion to weights. offset: in [0, 1), decides which shares are rounded up."""
    total, last = sum(weights), max(k for k, weight in enumerate(weights) if weight)
    reached, found, done = 0.0, [], 0
    for k, weight in enumerate(weights):
        reached += weight
        # rounding must not leave a sample without a source
        upto = batch_size if k >= last else floor(reached / total * batch_size + offset)
        found.append(min(upto, batch_size) - done if weight else 0)
        done += found[-1]
    return tuple(found)


def name_sources(root: str | None, sources: Mapping[str, Source | None], has_tars: bool) -> dict[str, Source]:
    """Return the sources that are not null, or the set of `root` as one without a name.

    has_tars: `data.urls` names tars instead.

    Raises:
        UserError: several or none of them are given, or a name that metric keys cannot hold.
    """
    mixed = {name: source for name, source in sources.items() if source is not None}
    if has_tars and (root is not None or mixed):
        raise UserError("data.urls names tars: set data.root to null and leave data.sources out")
    if not has_tars and (root is None) == (not mixed):
        shown = root and mask_url_secrets(root)
        raise UserError(
            f"data.root is {shown} and data.sources names {len(mixed)} sets: set only one of data.root and "
            "data.sources, the other to null"
        )
    for name in mixed:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"source {name!r} of data.sources: use letters, digits, '_', '.' and '-' in names")
    return mixed or {"": Source(str(root))}
