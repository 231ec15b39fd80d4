"""What a study found, in sentences: one per factor where its design crosses factors, else one per arm."""

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import ArmResult, StudyResult
from lightning_moevlm.study.report.figures import MANY_ARMS
from lightning_moevlm.study.report.tables.table import (
    format_interval,
    format_signed,
)
from lightning_moevlm.study.statistics.effects import Effect
from lightning_moevlm.study.statistics.factor_effects import FactorEffect
from lightning_moevlm.study.statistics.verdict import Verdict

_FEW_FINDINGS = 6


def describe_findings(result: StudyResult) -> tuple[str, ...]:
    """Return one sentence per factor and interaction, else per arm; many undecided interactions are counted."""
    if not result.factors:
        return tuple(describe_arm(result, arm) for arm in result.arms if arm.effect is not None)
    told = [one for one in result.factors if len(one.contrasts) == 1]
    pairs = [one for one in result.factors if len(one.contrasts) > 1]
    decided = [one for one in pairs if one.effect.verdict is not Verdict.INCONCLUSIVE]
    shown = pairs if len(pairs) <= _FEW_FINDINGS else decided
    sentences = [describe_factor(result, one) for one in (*told, *shown)]
    if len(shown) < len(pairs):
        sentences.append(f"{len(pairs) - len(shown)} of {len(pairs)} interactions of two factors: inconclusive.")
    return tuple(sentences)


def describe_answer(result: StudyResult) -> tuple[str, ...]:
    """Return the answer in lines for a terminal: the question, a line per finding, what was learned, what is unlike."""
    done = () if result.complete else ("Some runs have no result yet.",)
    unlike = ", ".join(one.name for one in result.unlike)
    return (
        f"Finding: {result.comparison.question}",
        *(f"  {sentence}" for sentence in (*filter(None, (count_verdicts(result),)), *describe_findings(result))),
        describe_learning(result),
        *done,
        *((f"Not the same in all runs: {unlike}.",) if unlike else ()),
    )


def count_verdicts(result: StudyResult) -> str:
    """Return one sentence on how many answers got which verdict; empty where they can be taken in at a glance."""
    of_factors = [one.effect.verdict for one in result.factors]
    verdicts = of_factors or [arm.effect.verdict for arm in result.arms if arm.effect is not None]
    if len(verdicts) <= _FEW_FINDINGS:
        return ""
    counts = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in Verdict if verdict in verdicts)
    if of_factors:
        return f"{len(verdicts)} main effects and interactions: {counts}."
    return f"{len(verdicts)} arms against {result.comparison.baseline}: {counts}."


def describe_arm(result: StudyResult, arm: ArmResult) -> str:
    """Return one sentence: what this arm's difference amounts to."""
    assert arm.effect is not None
    return _sentence(result, arm.arm.name, arm.effect, f"against {result.comparison.baseline}")


def describe_factor(result: StudyResult, one: FactorEffect) -> str:
    """Return one sentence: what a factor, or the interaction of two, amounts to."""
    first, *rest = one.contrasts
    if not rest:
        against = f"{first.level} against {first.other}" if first.is_switch else f"against {first.other_text}"
        return _sentence(result, one.name, one.effect, against)
    [second] = rest
    return _sentence(result, one.name, one.effect, f"added to the effect of {first.name} by {second.name}")


def describe_learning(result: StudyResult) -> str:
    """Return one sentence: whether training was worth anything, held against the untrained models."""
    behind = [
        f"{arm.arm.name} ({arm.learned} of {done} seeds)"
        for arm in result.arms
        if (done := arm.finished + arm.diverged) and arm.untrained and arm.learned < done
    ]
    title, _ = name_and_unit(result.comparison.primary.metric)
    if not any(arm.finished + arm.diverged for arm in result.arms):
        return "No run has a result yet."
    if not any(arm.untrained for arm in result.arms):
        return f"No run has logged {title} of its untrained model, so learning cannot be judged."
    if behind:
        return f"Not every run ended ahead of its untrained model in {title}: {', '.join(behind)} did."
    return f"Every run with a result ended ahead of its untrained model in {title}."


def describe_undrawn(result: StudyResult) -> str:
    """Return one sentence on arms that the pictures leave out, or an empty text."""
    if len(result.arms) <= MANY_ARMS:
        return ""
    return (
        f"Pictures show {MANY_ARMS} of {len(result.arms)} arms: the baseline and those furthest from it; the tables "
        "hold all."
    )


def _sentence(result: StudyResult, name: str, effect: Effect, against: str) -> str:
    title, unit = name_and_unit(result.comparison.primary.metric)
    start = f"{name}: {effect.text}"
    if effect.centre is None or effect.interval is None:
        return f"{start} ({effect.note})."
    title = title[0].upper() + title[1:]
    size = f"{format_signed(effect.centre)} {unit}".strip()
    interval = format_interval(effect.interval)
    sentence = f"{start}. {title} {size} {against}, interval {interval}, {len(effect.seeds)} seeds"
    if effect.verdict is Verdict.INCONCLUSIVE and (effect.seeds_needed or 0) > len(effect.seeds):
        sentence += f"; about {effect.seeds_needed} seeds would show an effect of this size"
    extra = f" ({effect.note})" if effect.note else ""
    return f"{sentence}{extra}."
