"""Builds the tables of effects, learning, further metrics and models.

One builder serves the terminal, Markdown and HTML, so that they cannot say different things.
"""

from collections import Counter

from lightning_moevlm.common.durations import format_duration
from lightning_moevlm.common.nearest_name import suggest
from lightning_moevlm.contracts.metric_keys import find_trivial, is_of_validation, name_and_unit
from lightning_moevlm.study.compare.results import ArmResult, StudyResult, list_also, make_rule, mean_of
from lightning_moevlm.study.declare.comparison import Correction, Test
from lightning_moevlm.study.plan.solve_arms import describe_solved
from lightning_moevlm.study.report.tables.table import (
    NOTHING,
    Table,
    format_count,
    format_interval,
    format_mean,
    format_percent,
    format_seed_count,
    format_signed,
)
from lightning_moevlm.study.statistics.effects import Effect
from lightning_moevlm.study.statistics.paired_tests import format_p
from lightning_moevlm.study.statistics.verdict import Verdict

_DECIDING: dict[Test, str] = {
    "t": "The wider of the t and the bootstrap interval of the mean decides, with the p of the paired t-test.",
    "wilcoxon": "Wilcoxon's signed-rank test decides. Effect and interval are of the centre (Hodges-Lehmann).",
    "sign": "The sign test decides. Effect and interval are of the median.",
}
_MOST_COLUMNS = 8  # of arms, beside three others
_BADLY = ("diverged", "did not learn", "crashed")
_CAPPED = (
    "In effects a run that failed counts with its capped value: its last one, but no worse than its untrained model's. "
    "That also stands for a value that is not finite."
)
_SEEDS_AGAINST_CHANCE = (
    "If an arm's note gives a p of failures by chance, its seeds needed are those at which chance no longer explains "
    "the same shares of failures."
)
_CORRECTED: dict[Correction, str] = {
    "none": "Neither p nor intervals are corrected for the number of comparisons.",
    "holm": "p is corrected for the number of comparisons (Holm). Intervals are not.",
}


def effects_table(result: StudyResult) -> Table:
    """Return final value, effect with interval, and verdict of each arm."""
    study = result.comparison
    title, unit = name_and_unit(study.primary.metric)
    interval = f"{100 * (1 - study.decide.alpha):g} % interval"
    rule = make_rule(study)
    p = "p (Holm)" if rule.correction == "holm" else "p"
    columns = ("arm", "final", "effect", interval, "verdict", p, "seeds better", "seeds needed")
    rows = tuple(_effect_row(arm, rule.alpha) for arm in result.arms)
    notes = [
        f"final: {title} ({study.primary.metric}, {unit or 'no unit'}, {study.primary.direction} is better), mean ± "
        "standard deviation over runs that survived, without those that diverged or did not learn. (k of n): over k of "
        "the n seeds.",
        f"effect: arm minus {study.baseline}, paired by seed. {_DECIDING[rule.test]} {_CORRECTED[rule.correction]}",
        "seeds needed: for 80 % power of one t-test at this effect and spread. It is estimated from 3 seeds on, up to "
        "1,000.",
        *([_CAPPED, _SEEDS_AGAINST_CHANCE] if any(arm.failed for arm in result.arms) else []),
    ]
    if rule.within is not None:
        notes.append(f"no difference: the whole interval lies within ±{rule.within:g}, the study's `within`.")
    notes += [
        f"guard: {guard.metric} ({guard.direction} is better) may get worse by at most {guard.at_most:g} on average."
        for guard in study.guard
    ]
    notes += [f"{arm.arm.name}: {arm.effect.note}." for arm in result.arms if arm.effect and arm.effect.note]
    return Table(f"Effect on {title}", columns, rows, tuple(notes), essential=5, figure="effects")


def factors_table(result: StudyResult) -> Table | None:
    """Return main effects and two-way interactions; None if the design crosses no factors."""
    if not result.factors:
        return None
    rule = make_rule(result.comparison)
    interval = f"{100 * (1 - rule.alpha):g} % interval"
    columns = ("factor", "effect", interval, "verdict", "p (Holm)" if rule.correction == "holm" else "p")
    rows = tuple((one.name, *_contrast_cells(one.effect, rule.alpha)) for one in result.factors)
    title, _ = name_and_unit(result.comparison.primary.metric)
    mains = [one.contrasts[0] for one in result.factors if len(one.contrasts) == 1]
    notes = []
    if any(contrast.is_switch for contrast in mains):
        notes.append(
            "a switch: mean over arms with it on minus mean with it off, by seed. The verdict is on turning it on."
        )
    levels = dict.fromkeys(contrast.other_text for contrast in mains if not contrast.is_switch)
    if levels:
        notes.append(f"a level: mean over its arms minus mean over arms at {' or '.join(levels)}, paired by seed.")
    notes.append("A x B: effect of A with B minus effect of A without it. It is 0 if the two effects add up.")
    for fraction in result.comparison.design.fractions if result.comparison.design else ():
        notes.append(
            f"a fraction of all combinations: {len(fraction.runs())} runs. Aliased effects cannot be separated."
        )
        notes += [f"{line}." for line in fraction.describe()[1:]]
    by_note: dict[str, list[str]] = {}  # a seed that is left out is so in every contrast
    for one in result.factors:
        by_note.setdefault(one.effect.note, []).append(one.name)
    notes += [f"{', '.join(names)}: {note}." for note, names in by_note.items() if note]
    return Table(
        f"Main effects and interactions on {title}", columns, rows, tuple(notes), essential=4, figure="factors"
    )


def learning_table(result: StudyResult) -> Table:
    """Return final values and accuracies beside those of the untrained model and of the constant answer."""
    title, _ = name_and_unit(result.comparison.primary.metric)
    terms = tuple(sorted({term for arm in result.arms for term in arm.accuracy}))
    columns = ("arm", "untrained", "final", *(f"accuracy {term} (majority)" for term in terms), "learned")
    rows = tuple(
        (
            arm.arm.name,
            f"{arm.untrained.mean:.4f}" if arm.untrained else NOTHING,
            f"{arm.final.mean:.4f}{format_seed_count(arm.final, arm.planned)}" if arm.final else _no_final(arm),
            *(_accuracy(arm, term) for term in terms),
            _format_learned(arm),
        )
        for arm in result.arms
    )
    notes = (
        f"untrained, final: {title}, mean over seeds. Final and accuracy are of runs that survived. learned: seeds in "
        "which final is better than untrained.",
        "accuracy: at masked positions of held-out data. In brackets: that of always answering the commonest class.",
    )
    return Table("Has anything been learned?", columns, rows, notes, figure="accuracy")


def models_table(result: StudyResult) -> Table:
    """Return size, compute, speed and number of runs of each arm."""
    columns = ("arm", "parameters", "active", "active FLOPs", "samples/s", "time/run", "finished", *_BADLY)
    rows = tuple(
        (
            arm.arm.name,
            *_format_sizes(arm),
            format_mean(arm.samples_per_second, 0),
            format_duration(arm.seconds.mean) if arm.seconds else NOTHING,
            f"{arm.finished}/{arm.planned}",
            str(arm.diverged),
            str(arm.not_learned),
            str(arm.crashed),
        )
        for arm in result.arms
    )
    notes = (
        "active FLOPs: forward, per sample. Parameters and FLOPs are the backbone's, without heads.",
        "samples/s and time depend on other load of the machine. Runs of one sweep share a machine.",
        *describe_solved(result.comparison, {arm.arm.name: arm.card for arm in result.arms}),
        *_notes_on_taken(result),
        *(
            f"{arm.arm.name}: unknown, because this version cannot build its model."
            for arm in result.arms
            if not arm.card
        ),
    )
    return Table("Models and cost", columns, rows, notes, figure="pareto")


def metrics_table(result: StudyResult) -> Table | None:
    """Return the last values of the primary and the further metrics beside trivial ones; None without any of these.

    A row per metric and a column per arm. Where the arms are too many for that, it is turned round.
    """
    study = result.comparison
    if not list_also(study):
        return None
    keys = tuple(dict.fromkeys((study.primary.metric, *study.also)))
    rows = [("metric", "trivial", "untrained", *(arm.arm.name for arm in result.arms))]
    rows += [
        (
            _name_with_unit(key),
            _trivial(result, key),
            _untrained(result, key),
            *(_last(arm, None if key == study.primary.metric else key) for arm in result.arms),
        )
        for key in keys
    ]
    notes = (
        "trivial: on the same samples, without a model: the best constant answer, a random ranking, another image's "
        "caption or token frequencies.",
        "untrained: validated before the first step, mean over the runs of all arms.",
        *_notes_on_absent(result),
    )
    if len(result.arms) > _MOST_COLUMNS:
        rows = [("arm", *rows[0][1:]), *rows[1:]]
        rows = list(zip(*rows, strict=True))
    return Table("Metrics, mean ± standard deviation over runs that survived", rows[0], tuple(rows[1:]), notes)


def _notes_on_absent(result: StudyResult) -> tuple[str, ...]:
    """Return one note per further metric that no run has logged: most often its name is mistyped."""
    logged = {key for arm in result.arms for run in arm.runs for key in run.series}
    absent = (key for key in result.comparison.also if logged and key not in logged)
    return tuple(
        f"{key}: no run has logged it; {suggest(key, logged)}correct `also` in the study file." for key in absent
    )


def _last(arm: ArmResult, key: str | None) -> str:
    """Return an arm's last value of a metric; of the primary one without a key."""
    mean = arm.final if key is None else arm.also.get(key)
    return format_mean(mean, 4) + format_seed_count(mean, arm.planned)


def _name_with_unit(key: str) -> str:
    unit = name_and_unit(key)[1]
    return f"{key} ({unit})" if unit else key


def _untrained(result: StudyResult, key: str) -> str:
    if not is_of_validation(key):
        return NOTHING
    mean = mean_of([run.first(key) for arm in result.arms for run in arm.runs])
    return f"{mean.mean:.4f}" if mean else NOTHING


def _trivial(result: StudyResult, key: str) -> str:
    """Return the trivial value beside a metric; the range of it where arms are measured on unlike samples."""
    trivial = find_trivial(key)
    values = sorted(arm.also[trivial].mean for arm in result.arms if trivial in arm.also) if trivial else []
    shown = dict.fromkeys(f"{value:.4f}" for value in (values[:1] + values[-1:]))
    return " to ".join(shown) or NOTHING


def answer_table(result: StudyResult) -> Table:
    """Return the table of factors if the design crosses them, else that of arms."""
    return factors_table(result) or effects_table(result)


def _notes_on_taken(result: StudyResult) -> tuple[str, ...]:
    """Return one note per study that runs were taken from."""
    origins = [run.state.taken_from for arm in result.arms for run in arm.runs if run.state.taken_from]
    total = sum(len(arm.runs) for arm in result.arms)
    counts = Counter(origin.partition("/")[0] for origin in origins)
    return tuple(
        f"{count} of {total} runs were taken from study {study}. Their times were measured there."
        for study, count in counts.items()
    )


def _format_sizes(arm: ArmResult) -> tuple[str, str, str]:
    card = arm.card
    if card is None:
        return NOTHING, NOTHING, NOTHING
    return (
        format_count(card.total_parameters),
        format_count(card.active_parameters),
        format_count(card.active_flops_per_sample),
    )


def _effect_row(arm: ArmResult, alpha: float) -> tuple[str, ...]:
    final = format_mean(arm.final, 4) + format_seed_count(arm.final, arm.planned) if arm.final else _no_final(arm)
    effect = arm.effect
    if effect is None:
        return (arm.arm.name, final, NOTHING, NOTHING, str(arm.verdict), NOTHING, NOTHING, NOTHING)
    better = None if effect.share_better is None else round(effect.share_better * len(effect.seeds))
    return (
        arm.arm.name,
        final,
        *_contrast_cells(effect, alpha),
        NOTHING if better is None else f"{better} of {len(effect.seeds)}",
        NOTHING if effect.seeds_needed is None else str(effect.seeds_needed),
    )


def _contrast_cells(effect: Effect, alpha: float) -> tuple[str, ...]:
    """Return effect, interval, verdict and p."""
    return (
        NOTHING if effect.centre is None else format_signed(effect.centre),
        NOTHING if effect.interval is None else format_interval(effect.interval),
        effect.text,
        NOTHING if effect.p_adjusted is None else format_p(effect.p_adjusted, alpha),
    )


def _no_final(arm: ArmResult) -> str:
    if arm.verdict is Verdict.STOPPED_EARLY:
        return str(arm.verdict)
    return f"{arm.failed} of {arm.planned} failed" if arm.failed else NOTHING


def _format_learned(arm: ArmResult) -> str:
    return f"{arm.learned} of {arm.done} seeds" if arm.done and arm.untrained else NOTHING


def _accuracy(arm: ArmResult, term: str) -> str:
    if term not in arm.accuracy:
        return NOTHING
    majority = f" ({format_percent(arm.majority[term].mean)})" if term in arm.majority else ""
    return format_percent(arm.accuracy[term].mean) + majority
