"""`moevlm compare`: options of a comparison of any runs; `study/any_runs.py` carries it out."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_moevlm.cli.output import console, show
from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from lightning_moevlm.study.any_runs import Describe

_LISTS = ("--by", "--also", "--guard", "--did_not_learn")  # options that may be given more than once
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
    did_not_learn: list[str] | None = None,
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
        direction: Direction of improvement; by default as `moevlm list metrics` shows.
        by: Config key or tag that defines the arms, e.g. model.losses.router_z; may be repeated. Arms may then
            differ in it.
        baseline: Name of the baseline, as shown in the tables.
        within: Largest difference that does not matter, in the metric's unit; without it the verdict "no difference" is
            never given.
        guard: METRIC=AMOUNT, a metric that may not get worse by more than that; may be repeated. An arm that breaks it
            does not help.
        also: A further metric to report, without a verdict; may be repeated.
        did_not_learn: KEY=VALUE of the rule by which a run that reached its end failed, as in a study file, e.g.
            share_of_healthy=0.8, no_better_than=val/majority_text or stalled_steps=200; may be repeated.
        correction: Correction of the p values over all comparisons with the baseline.
        unfair: Compare also runs that differ in steps, schedule, batch, data, their order or validation samples.
        report: Folder for HTML, Markdown and images; null writes none.
        json: Write records to this file as JSON instead of the tables; - is standard output.
        records: Content of `json`: arms (effects, stability, cost), learning rates, or differences between runs.
        tracking_uri: MLflow store of the runs; by default MLFLOW_TRACKING_URI, else runs/mlflow.db.
        full: Also print every table of a report: stability, costs, receipts, fairness.
    """
    from lightning_moevlm.study import any_runs

    if not runs:
        raise UserError("no run to compare: moevlm compare RUN RUN..., each a name, an id or TAG=VALUE; see --help")
    if within is not None and within <= 0:
        raise UserError(f"--within is {within:g}; give more than 0, or leave it out")
    guards = tuple(_guard(one) for one in guard or ())
    folder = None if report is None else Path(report).absolute()
    if folder is not None:
        any_runs.refuse_other_folder(folder)
    rules = any_runs.Rules(
        metric,
        direction,
        within,
        baseline,
        tuple(by or ()),
        tuple(also or ()),
        guards,
        correction,
        dict(_key_and_value(one) for one in did_not_learn or ()),
    )
    refuse = not unfair and records != "fairness"
    result = any_runs.compare_runs(any_runs.find_store(tracking_uri), runs, rules, _describe, unfair, refuse)
    page = None if folder is None else any_runs.write_comparison(result, folder, runs, by or (), unfair)
    if json is not None:
        show("", any_runs.make_records(result)[records], json)
        return
    terminal = console()
    any_runs.print_comparison(terminal, result, full)
    if page is not None:
        terminal.print(f"Report: {page}", highlight=False, soft_wrap=True)
    elif not full:
        terminal.print("More: --full=true prints every table, --report FOLDER writes a page.", highlight=False)


def expand_shorthand(words: Sequence[str]) -> list[str]:
    """Return a command line in which every word is a run unless it is an option or an option's value."""
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


def _describe() -> "Describe":
    from lightning_moevlm.configuration.resolver import describe_model

    return describe_model


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


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals or not value:
        raise UserError(f"--did_not_learn {text}: write KEY=VALUE, e.g. share_of_healthy=0.8")
    return key, value
