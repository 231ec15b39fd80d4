"""Builds the table of published claims and their sentences."""

from collections import Counter
from collections.abc import Sequence

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import ClaimResult, Reproduction, StudyResult
from lightning_moevlm.study.declare.claims import LR_SENSITIVITY
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_interval, format_mean, format_signed
from lightning_moevlm.study.statistics.paired_tests import format_p


def claims_table(result: StudyResult) -> Table | None:
    """Return what the runs say of each published claim; None if the study tests none."""
    if not result.claims:
        return None
    decide = result.comparison.decide
    corrected = decide.correction == "holm"
    columns = (
        "claim",
        "measure",
        "arm",
        "against",
        "expected",
        "difference",
        f"{100 * (1 - decide.alpha):g} % interval",
        "verdict",
        "p (Holm)" if corrected else "p",
    )
    notes = [
        "difference: arm minus what it is compared with, paired by seed. not seen: neither shown nor refuted.",
        *(f"{_number(result, one)}: {one.claim.says}" for one in result.claims),
        *(f"{_number(result, one)}: {one.effect.note}." for one in result.claims if one.effect.note),
    ]
    if corrected:
        notes.insert(1, "p is corrected for the number of claims (Holm), controls apart.")
    rows = tuple(_row(result, one) for one in result.claims)
    return Table("Published claims", columns, rows, tuple(notes), essential=8)


def describe_claims(result: StudyResult) -> tuple[str, ...]:
    """Return the number of claims by verdict, then a sentence on each; nothing if the study tests none."""
    if not result.claims:
        return ()
    published = [one for one in result.claims if not one.claim.is_control]
    controls = [one for one in result.claims if one.claim.is_control]
    lines = [f"Published claims: {_count(published)}."] if published else []
    lines += [f"Controls: {_count(controls)}."] if controls else []
    return (*lines, *(_sentence(result, one) for one in result.claims))


def _count(claims: Sequence[ClaimResult]) -> str:
    counts = Counter(one.verdict for one in claims)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Reproduction if counts[verdict])


def _sentence(result: StudyResult, one: ClaimResult) -> str:
    title = LR_SENSITIVITY if one.claim.metric == LR_SENSITIVITY else name_and_unit(one.claim.metric)[0]
    start = f"{_number(result, one)}, {one.claim.name}: {one.verdict}. {one.claim.says}"
    if one.effect.centre is None or one.effect.interval is None:
        return start
    size = f"{format_signed(one.effect.centre)} {format_interval(one.effect.interval)}"
    text = f"{start} Here {title} differs by {size} ({len(one.effect.seeds)} seeds; expected: {one.claim.expected})."
    return f"{text} Note: {one.effect.note}." if one.effect.note else text


def _number(result: StudyResult, one: ClaimResult) -> str:
    kind = "control" if one.claim.is_control else "claim"
    same = [other for other in result.claims if other.claim.is_control is one.claim.is_control]
    return f"{kind} {same.index(one) + 1}"


def _row(result: StudyResult, one: ClaimResult) -> tuple[str, ...]:
    effect, claim = one.effect, one.claim
    measure = claim.metric if claim.metric == claim.against_metric else f"{claim.metric} - {claim.against_metric}"
    return (
        _number(result, one),
        measure,
        f"{claim.arm} {format_mean(one.mine, 4)}",
        f"{claim.against} {format_mean(one.theirs, 4)}",
        claim.expected,
        NOTHING if effect.centre is None else format_signed(effect.centre),
        NOTHING if effect.interval is None else format_interval(effect.interval),
        str(one.verdict),
        NOTHING if effect.p_adjusted is None else format_p(_p(one), result.comparison.decide.alpha),
    )


def _p(one: ClaimResult) -> float:
    """Return the p of what was tested: of a claim of sameness that the difference is larger."""
    effect = one.effect
    p = effect.p_outside_adjusted if one.claim.within is not None else effect.p_adjusted
    return 1.0 if p is None else p
