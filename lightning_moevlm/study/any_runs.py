"""Compares any runs in MLflow: choose them, name their arms, refuse unfair comparisons, print and write the report."""

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.compare import collect_results, logged_runs
from lightning_moevlm.study.compare.fairness import refuse_biased
from lightning_moevlm.study.compare.logged_runs import Rules
from lightning_moevlm.study.compare.results import RunResult, StudyResult
from lightning_moevlm.study.declare.comparison import Comparison
from lightning_moevlm.study.report.make_report import ArmStory, Origin, make_report, print_answer
from lightning_moevlm.study.report.result_records import make_records
from lightning_moevlm.study.report.tables.logged_runs_table import runs_table
from lightning_moevlm.study.report.write_report import refuse_other_folder, write_report
from lightning_moevlm.tracking.read.run_selection import choose_runs
from lightning_moevlm.tracking.read.series import metric_series
from lightning_moevlm.tracking.store import has_store, prepare_store, resolve_tracking_uri, sqlite_path

if TYPE_CHECKING:
    from lightning_moevlm.contracts.model_card import ModelCard

Describe = Callable[[Mapping[str, object]], "ModelCard"]
"""Gives the model card of a whole configuration; raises UserError if this version cannot build it."""

__all__ = [
    "Rules",
    "compare_runs",
    "find_store",
    "make_records",
    "print_comparison",
    "refuse_other_folder",
    "write_comparison",
]


def find_store(tracking_uri: str | None) -> str:
    """Return the tracking URI in force, after checking that the store answers.

    Raises:
        UserError: There is no store, or it does not answer.
    """
    uri = resolve_tracking_uri(tracking_uri)
    if not has_store(uri):
        raise UserError(
            f"there is no store at {sqlite_path(uri)}; name another with --tracking_uri or MLFLOW_TRACKING_URI"
        )
    prepare_store(uri)
    return uri


def compare_runs(
    uri: str, runs: Sequence[str], rules: Rules, describe: Callable[[], Describe], unfair: bool, refuse: bool
) -> StudyResult:
    """Return the comparison of runs, paired by seed.

    Args:
        uri: The store.
        runs: Each a name, an id or TAG=VALUE; the arm of the first one is the baseline.
        rules: Metric, arms, guards and tests.
        describe: Called if a configuration was logged: importing the models takes seconds.
        unfair: Also take runs whose configuration is unknown.
        refuse: Refuse arms that differ in what biases a comparison.

    Raises:
        UserError: A run that is not found, or runs that make no fair comparison.
    """
    chosen = logged_runs.read_runs(choose_runs(uri, runs))
    if not unfair:
        logged_runs.refuse_unchecked(chosen)
    series = metric_series(uri, [one.row.run_id for one in chosen])
    comparison, results = logged_runs.comparison_of_runs(chosen, series, rules)
    result = collect_results.compare_arms(comparison, _describe_models(results, describe), results)
    if refuse:
        refuse_biased(comparison.name, result.unlike, logged_runs.suggest_remedy(result))
    return result


def write_comparison(result: StudyResult, folder: Path, runs: Sequence[str], by: Sequence[str], unfair: bool) -> Path:
    """Write the report as HTML, Markdown and figures; return its page.

    Raises:
        UserError: The folder cannot be written.
    """
    whole = make_report(_describe_origin(result, runs, by, unfair), result)
    with explain_write_errors(folder):
        return write_report(whole, folder)


def print_comparison(terminal: Console, result: StudyResult, full: bool) -> None:
    """Print the finding and the runs; full: then every other table too."""
    print_answer(terminal, result, full, before=(runs_table(result),))


def _rule(comparison: Comparison) -> dict[str, object]:
    """Return the keys and values of the rule by which a run did not learn."""
    if comparison.did_not_learn is None:
        return {}
    keys = dataclasses.asdict(comparison.did_not_learn)
    del keys["direction"]  # follows from the metric
    if keys["share_of_healthy"] is None:
        del keys["healthy"]
    return {key: value for key, value in keys.items() if value is not None}


def _describe_models(results: Sequence[RunResult], describe: Callable[[], Describe]) -> dict[str, "ModelCard | None"]:
    """Return the model card of each arm, from the configuration that its first run has logged."""
    cards: dict[str, ModelCard | None] = {}
    for arm, config in {result.arm: result.resolved for result in reversed(results)}.items():
        try:
            cards[arm] = describe()(config) if isinstance(config.get("model"), dict) else None
        except UserError as error:  # of another version, whose model this one cannot build: the rest can be compared
            cards[arm] = None
            text = (
                f"arm {arm!r}: parameters and FLOPs are unknown, because this version cannot build its model: {error}"
            )
            Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
    return cards


def _describe_origin(result: StudyResult, runs: Sequence[str], by: Sequence[str], unfair: bool) -> Origin:
    changes = logged_runs.describe_changes(result)
    comparison = result.comparison
    words = ["moevlm", "compare", *runs, "--metric", comparison.primary.metric]
    words += ["--direction", comparison.primary.direction, "--baseline", comparison.baseline]
    words += [word for key in by for word in ("--by", key)]
    words += [] if comparison.decide.within is None else ["--within", f"{comparison.decide.within:g}"]
    words += [word for one in comparison.guard for word in ("--guard", f"{one.metric}={one.at_most:g}")]
    words += [word for key in comparison.also for word in ("--also", key)]
    words += ["--correction", comparison.decide.correction]
    words += [word for key, value in _rule(comparison).items() for word in ("--did_not_learn", f"{key}={value}")]
    words += ["--unfair=true"] if unfair else []
    return Origin(
        kind="Comparison",
        compared_with=comparison.baseline,
        rerun=shlex.join(words),
        rerun_effect="reads them again",
        arms=tuple(
            ArmStory(arm.arm.name, "", tuple(f"{k}: {v}" for k, v in changes[arm.arm.name].items()), (), ())
            for arm in result.arms
        ),
        tables=(runs_table(result),),
    )
