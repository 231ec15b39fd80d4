"""Records of a comparison: arms, seeds and rules, whether of a study or of any runs."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lightning_moevlm.study.declare.claims import Claim
from lightning_moevlm.study.declare.decode import Positive, Record, Whole, doc, kind
from lightning_moevlm.study.declare.designs.design import Design
from lightning_moevlm.study.declare.factors import FactorLevel

Direction = Literal["lower", "higher"]
Test = Literal["t", "wilcoxon", "sign"]
Correction = Literal["none", "holm"]
ErrorRate = Annotated[float, kind("number between 0 and 1", gt=0, lt=1)]


class Solve(Record, frozen=True):
    """The option that makes an arm cost as much as the baseline. Needs `match: active_flops`."""

    key: Annotated[
        str, doc("Option of the arm that is a whole number, such as a width.", "model.backbone.init_args.hidden_dim")
    ]
    multiple_of: Annotated[Whole, doc("The number is a multiple of this.", "8")] = 8


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str  # in tables and folders
    description: str  # for the report
    # nested config over the base, in a plan with the solved number; empty for a listed baseline
    changes: dict[str, Any] = field(default_factory=dict)
    line: int = field(default=0, compare=False)  # line in the study file, from 1; for messages only
    levels: tuple[FactorLevel, ...] = ()  # the arm's level of each factor, in a designed study
    solve: Solve | None = None  # the option that a plan finds a number for
    solved: int | None = None  # the number, which is among the changes


@dataclass(frozen=True)
class Primary:
    """The metric that decides, and the direction that is progress."""

    metric: str
    direction: Direction


@dataclass(frozen=True)
class Divergence:
    """The rule by which a run has diverged: a non-finite value, or a last value above a multiple of the first one."""

    metric: str
    times_untrained: float
    # A run with so many values in a row above that has diverged and is ended; None: the last value decides
    in_a_row: int | None = None

    @property
    def text(self) -> str:
        """The rule in words."""
        early = f"{self.in_a_row} values in a row or " if self.in_a_row else ""
        return (
            f"{self.metric} not finite, or {early}its last value above {self.times_untrained:g} x the untrained model's"
        )


@dataclass(frozen=True)
class DidNotLearn:
    """The rule by which a run that reached its end did not learn. Each part that is not None is enough by itself."""

    metric: str
    direction: Direction  # of progress
    healthy: str  # arm whose progress is the measure
    share_of_healthy: float | None = None  # least share of its way from untrained model to end, at the same seed
    no_better_than: str | None = None  # metric of a constant answer
    stalled_steps: int | None = None  # optimiser steps at the end without a new best value

    @property
    def text(self) -> str:
        """The rule in words."""
        parts = []
        if self.share_of_healthy is not None:
            parts.append(f"ended at less than {self.share_of_healthy:g} of the way of {self.healthy} at the same seed")
        if self.no_better_than is not None:
            parts.append(f"no better than {self.no_better_than} at the end")
        if self.stalled_steps is not None:
            parts.append(f"no new best value in the last {self.stalled_steps} steps")
        return f"{self.metric}: {', or '.join(parts)}"


class FutilityStop(Record, frozen=True):
    """An arm that is withdrawn gets no verdict. Needs a budget of max_steps."""

    at_step: Annotated[Whole, doc("Optimiser step at which arms are compared with the baseline.", "30")]
    worse_by: Annotated[Positive, doc("Withdraw an arm that is behind by more, in the primary metric's unit.", "0.5")]

    @property
    def text(self) -> str:
        """The rule in words."""
        return f"worse than the baseline of its seed by more than {self.worse_by:g} at step {self.at_step}"


class Decision(Record, frozen=True):
    """The rule for verdicts."""

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
    """Arms, seeds and rules, without the configuration that runs them."""

    name: str
    question: str  # the report's headline
    hypothesis: str  # written before the runs, or ""
    source: str  # origin of the question, or ""
    baseline: str  # name of the arm that the others are compared with
    arms: tuple[Arm, ...]  # in the file's order
    seeds: tuple[int, ...]  # repetitions of every arm
    spends: str  # budget of a run in words
    equal_steps: bool  # whether all runs have the same number of steps; False if they share another budget
    primary: Primary  # the metric that decides
    also: tuple[str, ...]  # metrics to report beside it
    diverged: Divergence
    decide: Decision
    guard: tuple[Guard, ...] = ()  # metrics that may not get worse
    design: Design | None = None  # the design that made the arms; None if they were listed
    futility_stop: FutilityStop | None = None  # the rule that withdraws arms early
    did_not_learn: DidNotLearn | None = None  # None: a run that did not diverge has learned
    claims: tuple[Claim, ...] = ()  # published results that the arms decide
