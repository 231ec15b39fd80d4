"""What is compared with what, and by which rules: all that a result needs to know, be it of a study or of any runs."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lightning_moevlm.study.declare.decode import Positive, Record, Whole, doc, kind
from lightning_moevlm.study.declare.design import Design
from lightning_moevlm.study.declare.factors import FactorLevel

Direction = Literal["lower", "higher"]
Test = Literal["t", "wilcoxon", "sign"]
Correction = Literal["none", "holm"]
ErrorRate = Annotated[float, kind("number between 0 and 1", gt=0, lt=1)]


@dataclass(frozen=True)
class Arm:
    """One way to train. changes: nested config that is merged over the base; of an explicit baseline empty.

    line: where the study file declares it, from 1; for messages, no part of what the arm is. levels: of a designed
    study, where the arm stands in each factor.
    """

    name: str
    description: str
    changes: dict[str, Any] = field(default_factory=dict)
    line: int = field(default=0, compare=False)
    levels: tuple[FactorLevel, ...] = ()


@dataclass(frozen=True)
class Primary:
    """The metric that decides, and the direction that is progress."""

    metric: str
    direction: Direction


@dataclass(frozen=True)
class Divergence:
    """When a run counts as diverged: a non-finite value, or a last value above `times_untrained` x the first one.

    in_a_row: a run whose values lie above that for so many points in a row has diverged, whatever comes after, and is
    ended there; null judges the last value alone.
    """

    metric: str
    times_untrained: float
    in_a_row: int | None = None

    @property
    def text(self) -> str:
        """The rule in words."""
        early = f"{self.in_a_row} values in a row or " if self.in_a_row else ""
        return (
            f"{self.metric} not finite, or {early}its last value above {self.times_untrained:g} x the untrained model's"
        )


class FutilityStop(Record, frozen=True):
    """An arm that is withdrawn gets no verdict. Needs a budget of max_steps."""

    at_step: Annotated[Whole, doc("Optimiser step at which arms are compared with the baseline.", "30")]
    worse_by: Annotated[Positive, doc("Withdraw an arm that is behind by more, in the primary metric's unit.", "0.5")]

    @property
    def text(self) -> str:
        """The rule in words."""
        return f"worse than the baseline of its seed by more than {self.worse_by:g} at step {self.at_step}"


class Decision(Record, frozen=True):
    """How verdicts are reached."""

    alpha: Annotated[ErrorRate, doc("Two-sided error rate. Intervals cover 1 - alpha.", "0.05")] = 0.05
    test: Annotated[Test, doc("Paired test that decides.", "t")] = "t"
    correction: Annotated[Correction, doc("Correction of p for the number of comparisons.", "none")] = "none"
    within: Annotated[
        Positive | None,
        doc(
            "Largest difference that does not matter, in the primary metric's unit.",
            "null",
            default="none: no verdict says `no difference`",
        ),
    ] = None


@dataclass(frozen=True)
class Guard:
    """A metric that an arm may not make worse than the baseline's by more than `at_most`, in the metric's unit."""

    metric: str
    direction: Direction
    at_most: float


@dataclass(frozen=True)
class Comparison:
    """Arms, seeds and rules, without what it takes to run them.

    name: of the study. spends: what each run may spend, in words. equal_steps: whether that is the same number of steps
    for all of them; False where it is the same of something else. also: metrics that are told beside the primary one.
    design: what made the arms, None where they were listed.
    """

    name: str
    question: str
    hypothesis: str
    source: str
    baseline: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    spends: str
    equal_steps: bool
    primary: Primary
    also: tuple[str, ...]
    diverged: Divergence
    decide: Decision
    guard: tuple[Guard, ...] = ()
    design: Design | None = None
    futility_stop: FutilityStop | None = None
