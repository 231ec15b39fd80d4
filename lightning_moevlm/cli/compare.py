"""`moevlm compare`: the tables of a study's report for any runs in MLflow."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_moevlm.cli.output import console, show
from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from lightning_moevlm.contracts.model_card import ModelCard
    from lightning_moevlm.study.compare.results import RunResult, StudyResult
    from lightning_moevlm.study.report.make_report import Origin

_LISTS = ("--by", "--also", "--guard")  # options that may be given more than once
_ALONE = ("--help", "--print_config")  # options without a value


def compare(
    runs: list[str] | None = None,
    metric: str = "val/task_loss",
    direction: Literal["lower", "higher"] | None = None,
    by: list[str] | None = None,
    baseline: str | None = None,
    within: float | None = None,
    guard: list[str] | None = None,
    also: list[str] | None = None,
    correction: Literal["none", "holm"] = "holm",
    unfair: bool = False,
    report: str | None = None,
    json: str | None = None,
    records: Literal["arms", "learning_rates", "fairness"] = "arms",
    tracking_uri: str | None = None,
    full: bool = False,
) -> None:
    """Compare any runs in MLflow, paired by seed: moevlm compare RUN RUN... gives the tables of a study's report.

    A RUN is a run's name, its id (or at least 4 digits that it begins with), or TAG=VALUE[,TAG=VALUE] for all runs with
    these tags, e.g. sweep=quickstart,role=arm. Runs with a tag `arm` are of that arm; the others are of one arm where
    their configurations agree but for the seed.

    Args:
        runs: The runs; the first one's arm is the baseline.
        metric: Metric that decides.
        direction: Direction of improvement; by default that of the metric's declaration.
        by: Config key or tag that defines the arms, e.g. model.losses.router_z; may be repeated. Arms may then
            differ in it.
        baseline: Name of the baseline, as shown in the tables.
        within: Largest difference that does not matter, in the metric's unit; null: no verdict says "no difference".
        guard: METRIC=AMOUNT, a metric that may not get worse by more than that; may be repeated. An arm that breaks it
            does not help.
        also: A further metric to report, without a verdict; may be repeated.
        correction: Correction of the p values over all comparisons with the baseline.
        unfair: Compare also runs that differ in steps, schedule, batch, data, their order or validation samples.
        report: Folder for HTML, Markdown and images; null writes none.
        json: Write records to this file as JSON instead of the tables; - is standard output.
        records: Content of `json`: arms (effects, stability, cost), learning rates, or differences between runs.
        tracking_uri: MLflow store of the runs; by default MLFLOW_TRACKING_URI, else runs/mlflow.db.
        full: Also print every table of a report: stability, costs, receipts, fairness.
    """
    from rich.text import Text

    from lightning_moevlm.study.compare import collect_results, logged_runs
    from lightning_moevlm.study.compare.fairness import refuse_biased
    from lightning_moevlm.study.report.make_report import make_report, print_answer
    from lightning_moevlm.study.report.tables.logged_runs_table import runs_table
    from lightning_moevlm.study.report.write_report import make_records, refuse_other_folder, write_report
    from lightning_moevlm.tracking.read.run_selection import choose_runs
    from lightning_moevlm.tracking.read.series import metric_series
    from lightning_moevlm.tracking.store import prepare_store, resolve_tracking_uri, sqlite_path

    if not runs:
        raise UserError("no run to compare: moevlm compare RUN RUN..., each a name, an id or TAG=VALUE; see --help")
    if within is not None and within <= 0:
        raise UserError(f"--within is {within:g}; give more than 0, or leave it out")
    guards = tuple(_guard(one) for one in guard or ())
    folder = None if report is None else Path(report).absolute()
    if folder is not None:
        refuse_other_folder(folder)
    uri = resolve_tracking_uri(tracking_uri)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise UserError(f"there is no store at {path}; name another with --tracking_uri or MLFLOW_TRACKING_URI")
    prepare_store(uri)
    chosen = logged_runs.read_runs(choose_runs(uri, runs))
    if not unfair:
        logged_runs.refuse_unchecked(chosen)
    series = metric_series(uri, [one.row.run_id for one in chosen])
    asked = (tuple(by or ()), tuple(also or ()), guards, correction)
    rules = logged_runs.Rules(metric, direction, within, baseline, *asked)
    comparison, results = logged_runs.comparison_of_runs(chosen, series, rules)
    result = collect_results.compare_arms(comparison, _cards(results), results)
    if not unfair and records != "fairness":
        refuse_biased(comparison.name, result.unlike, logged_runs.suggest_remedy(result))
    if folder is not None:
        whole = make_report(_origin(result, runs, by or (), unfair), result)
        with explain_write_errors(folder):
            page = write_report(whole, folder)
    if json is not None:
        show(Text(), make_records(result)[records], json)
        return
    terminal = console()
    print_answer(terminal, result, full, before=(runs_table(result),))
    if folder is not None:
        terminal.print(f"Report: {page}", highlight=False, soft_wrap=True)
    elif not full:
        terminal.print("More: --full=true prints every table, --report FOLDER writes a page.", highlight=False)


def expand_shorthand(words: Sequence[str]) -> list[str]:
    """Return a command line in which every word that is no option and no option's value is a run."""
    command, *rest = words
    full = [command]
    follows_option = False
    for word in rest:
        if follows_option:
            full.append(word)
            follows_option = False
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            full.append(f"{name}+{equals}{value}" if name in _LISTS else word)
            follows_option = not equals and name not in _ALONE
        elif word.startswith("-"):
            full.append(word)
        else:
            full += ["--runs+", word]
    return full


def _cards(results: "Sequence[RunResult]") -> "dict[str, ModelCard | None]":
    """Return what the model of each arm costs, from the configuration that its first run has logged."""
    first = {result.arm: result.resolved for result in reversed(results)}
    describe: Callable[[Mapping[str, object]], ModelCard] | None = None
    cards: dict[str, ModelCard | None] = {}
    for arm, config in first.items():
        cards[arm] = None
        if not isinstance(config.get("model"), dict):
            continue
        if describe is None:
            from lightning_moevlm.configuration.resolver import describe_model

            describe = describe_model
        cards[arm] = _card(describe, arm, config)
    return cards


def _card(
    describe: "Callable[[Mapping[str, object]], ModelCard]", arm: str, config: Mapping[str, Any]
) -> "ModelCard | None":
    from rich.console import Console

    try:
        return describe(config)
    except UserError as error:  # of another version, whose model this one cannot build: the rest can be compared
        told = f"arm {arm!r}: parameters and FLOPs are unknown, because this version cannot build its model: {error}"
        Console(stderr=True, soft_wrap=True, highlight=False).print(told, markup=False)
        return None


def _guard(text: str) -> tuple[str, float]:
    metric, _, amount = text.rpartition("=")
    try:
        at_most = float(amount)
    except ValueError:
        at_most = math.nan
    if not metric or not 0 <= at_most < math.inf:
        raise UserError(
            f"--guard {text}: write METRIC=AMOUNT with the amount, 0 or more, by which it may get worse, e.g. "
            "drop_rate/block1/text=0.05"
        )
    return metric, at_most


def _origin(result: "StudyResult", runs: Sequence[str], by: Sequence[str], unfair: bool) -> "Origin":
    from lightning_moevlm.study.compare.logged_runs import describe_changes
    from lightning_moevlm.study.report.make_report import ArmStory, Origin
    from lightning_moevlm.study.report.tables.logged_runs_table import runs_table

    changes = describe_changes(result)
    comparison = result.comparison
    words = ["moevlm", "compare", *runs, "--metric", comparison.primary.metric]
    words += ["--direction", comparison.primary.direction, "--baseline", comparison.baseline]
    words += [word for key in by for word in ("--by", key)]
    words += [] if comparison.decide.within is None else ["--within", f"{comparison.decide.within:g}"]
    words += [word for one in comparison.guard for word in ("--guard", f"{one.metric}={one.at_most:g}")]
    words += [word for key in comparison.also for word in ("--also", key)]
    words += ["--correction", comparison.decide.correction]
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
