"""Builds the table of tasks and arms that a guide shows: titles instead of keys, beside what needs no training."""

from lightning_moevlm.contracts.metric_keys import find_metric, find_trivial, is_of_validation, name_and_unit
from lightning_moevlm.study.compare.results import ArmResult, StudyResult, list_also, mean_of
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_mean, format_seed_count

_DECIMALS = 3


def guide_table(result: StudyResult) -> Table | None:
    """Return a row per metric, the primary first, and a column per arm; None without further metrics."""
    study = result.comparison
    if not list_also(study):
        return None
    keys = tuple(dict.fromkeys((study.primary.metric, *study.also)))
    return Table(
        study.question,
        ("task, metric", "without training", *(arm.arm.name for arm in result.arms)),
        tuple(
            (_title(key), _baseline(result, key), *(_value(result, arm, key) for arm in result.arms)) for key in keys
        ),
        (
            f"Mean ± standard deviation over {len(study.seeds)} seeds, {study.spends} each; (k of n): over k runs that "
            "survived. Without training: what needs no model, on the same samples, or else the untrained model.",
        ),
    )


def _title(key: str) -> str:
    return name_and_unit(key)[0].removeprefix("validation ")


def _value(result: StudyResult, arm: ArmResult, key: str) -> str:
    mean = arm.final if key == result.comparison.primary.metric else arm.also.get(key)
    return format_mean(mean, _DECIMALS) + format_seed_count(mean, arm.planned)


def _baseline(result: StudyResult, key: str) -> str:
    """Return the value without a model, with its name; else that of the untrained model."""
    trivial = find_trivial(key)
    family = find_metric(trivial) if trivial else None
    values = sorted(arm.also[trivial].mean for arm in result.arms if trivial in arm.also) if trivial else []
    if values and family is not None:
        shown = dict.fromkeys(f"{value:.{_DECIMALS}f}" for value in (values[0], values[-1]))
        return f"{' to '.join(shown)} ({family.title})"
    untrained = None
    if is_of_validation(key):
        untrained = mean_of([run.first(key) for arm in result.arms for run in arm.runs])
    return f"{untrained.mean:.{_DECIMALS}f} (untrained)" if untrained else NOTHING
