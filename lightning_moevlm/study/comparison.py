"""What is compared with what, and by which rules: all that a result needs to know, be it of a study or of any runs."""

from dataclasses import dataclass

from lightning_moevlm.study.design import Design
from lightning_moevlm.study.spec import Arm, Decision, Divergence, Guard, Hopeless, Primary, Study


@dataclass(frozen=True)
class Comparison:
    """Arms, seeds and rules, without what it takes to run them.

    spends: what each run may spend, in words. equal_steps: whether that is the same number of steps for all of them;
    False where it is the same of something else. The other fields are those of `Study`.
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
    stop_hopeless: Hopeless | None = None


def comparison_of(study: Study) -> Comparison:
    """Return what a study compares."""
    return Comparison(
        name=study.name,
        question=study.question,
        hypothesis=study.hypothesis,
        source=study.source,
        baseline=study.baseline,
        arms=study.arms,
        seeds=study.seeds,
        spends=study.budget.words,
        equal_steps=study.budget.max_steps is not None,
        primary=study.primary,
        also=study.also,
        diverged=study.diverged,
        decide=study.decide,
        guard=study.guard,
        design=study.design,
        stop_hopeless=study.stop_hopeless,
    )
