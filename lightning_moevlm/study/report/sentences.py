"""States a study's findings in sentences: one per factor if the design crosses factors, else one per arm."""

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import ArmResult, StudyResult
from lightning_moevlm.study.report.figures import MANY_ARMS
from lightning_moevlm.study.report.tables.claims_table import describe_claims
from lightning_moevlm.study.report.tables.table import format_interval, format_signed
from lightning_moevlm.study.statistics.effects import Effect
from lightning_moevlm.study.statistics.factor_effects import FactorEffect
from lightning_moevlm.study.statistics.verdict import Verdict

_FEW_FINDINGS = 6


def describe_findings(result: StudyResult) -> tuple[str, ...]:
    """Return sentences on published claims, then one per factor and interaction, else per arm.

    Many inconclusive interactions are counted.
    """
    claims = describe_claims(result)
    if not result.factors:
        return (*claims, *(describe_arm(result, arm) for arm in result.arms if arm.effect is not None))
    mains = [one for one in result.factors if len(one.contrasts) == 1]
    pairs = [one for one in result.factors if len(one.contrasts) > 1]
    decided = [one for one in pairs if one.effect.verdict is not Verdict.INCONCLUSIVE]
    shown = pairs if len(pairs) <= _FEW_FINDINGS else decided
    sentences = [describe_factor(result, one) for one in (*mains, *shown)]
    if len(shown) < len(pairs):
        sentences.append(f"{len(pairs) - len(shown)} of {len(pairs)} interactions of two factors: inconclusive.")
    return (*claims, *sentences)


def describe_answer(result: StudyResult) -> tuple[str, ...]:
    """Return the lines for a terminal: question, findings, learning, and differences between the runs."""
    unlike = ", ".join(one.name for one in result.unlike)
    return (
        f"Finding: {result.comparison.question}",
        *(f"  {sentence}" for sentence in (*filter(None, (count_verdicts(result),)), *describe_findings(result))),
        describe_learning(result),
        *(() if result.complete else ("Some runs have no result yet.",)),
        *((f"Not the same in all runs: {unlike}.",) if unlike else ()),
    )


def count_verdicts(result: StudyResult) -> str:
    """Return one sentence with the number of each verdict; empty for a few verdicts."""
    of_factors = [one.effect.verdict for one in result.factors]
    verdicts = of_factors or [arm.effect.verdict for arm in result.arms if arm.effect is not None]
    if len(verdicts) <= _FEW_FINDINGS:
        return ""
    counts = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in Verdict if verdict in verdicts)
    if of_factors:
        return f"{len(verdicts)} main effects and interactions: {counts}."
    return f"{len(verdicts)} arms compared with {result.comparison.baseline}: {counts}."


def describe_arm(result: StudyResult, arm: ArmResult) -> str:
    """Return the verdict on an arm, with its effect."""
    assert arm.effect is not None
    title, _ = name_and_unit(result.comparison.primary.metric)
    return _sentence(result, arm.arm.name, arm.effect, f"Compared with {result.comparison.baseline}, {title} changed")


def describe_factor(result: StudyResult, one: FactorEffect) -> str:
    """Return the verdict on a factor, or on the interaction of two, with its effect."""
    first, *rest = one.contrasts
    title, _ = name_and_unit(result.comparison.primary.metric)
    if rest:
        start = f"{rest[0].name} changed the effect of {first.name} on {title}"
    elif first.is_switch:
        start = f"Turning it on changed {title}"
    else:
        start = f"Compared with {first.other_text}, {title} changed"
    return _sentence(result, one.name, one.effect, start)


def describe_learning(result: StudyResult) -> str:
    """Return one sentence that compares the trained models with the untrained ones."""
    better = result.comparison.primary.direction
    behind = [
        f"{arm.arm.name} ({better} in {arm.learned} of {done} seeds)"
        for arm in result.arms
        if (done := arm.done) and arm.untrained and arm.learned < done
    ]
    title, _ = name_and_unit(result.comparison.primary.metric)
    if not any(arm.done for arm in result.arms):
        return "No run has a result yet."
    if not any(arm.untrained for arm in result.arms):
        return f"No run has logged {title} of its untrained model, so learning cannot be judged."
    if behind:
        learned = f"Some runs do not end with a {better} {title} than their untrained model: {', '.join(behind)}."
    else:
        learned = f"Every run with a result ends with a {better} {title} than its untrained model."
    failed = [f"{arm.arm.name} ({arm.failed} of {arm.done})" for arm in result.arms if arm.failed]
    return f"{learned} Runs that diverged or did not learn: {', '.join(failed)}." if failed else learned


def describe_undrawn(result: StudyResult) -> str:
    """Return one sentence on arms that the figures leave out, or an empty text."""
    if len(result.arms) <= MANY_ARMS:
        return ""
    shown = f"{MANY_ARMS} of {len(result.arms)} arms"
    return f"Figures show {shown}: the baseline and those furthest from it. Tables show all arms."


def _sentence(result: StudyResult, name: str, effect: Effect, start: str) -> str:
    if effect.centre is None or effect.interval is None:
        return f"{name}: {effect.text} ({effect.note})."
    level = f"{100 * (1 - result.comparison.decide.alpha):g} %"
    size = f"{format_signed(effect.centre)} ({level} interval {format_interval(effect.interval)}"
    sentences = [f"{name}: {effect.text}.", f"{start} by {size}, {len(effect.seeds)} seeds)."]
    if effect.verdict is Verdict.INCONCLUSIVE and (effect.seeds_needed or 0) > len(effect.seeds):
        sentences.append(f"About {effect.seeds_needed} seeds would show an effect of this size.")
    if effect.note:
        sentences.append(f"Note: {effect.note}.")
    return " ".join(sentences)
