"""Opens a study in MLflow grouped by arm, in the report's colours: a chart view that MLflow's UI calls shared.

The UI keeps a shared view as a tag of the experiment: an envelope with a name and the view's state, which is deflated
JSON. Colours are a tag of each run. The view shows the runs of arms alone, so the summary run stands apart. Metrics
that have no section of their own stay in sections that are closed. Groups of runs get colours that a store cannot set,
so each run is a curve of its own, in the colour of its arm.
"""

import base64
import json
import zlib
from collections.abc import Iterable
from typing import Any

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.report.figures.report_figure import choose_looks
from lightning_moevlm.study.run.mlflow_runs import ROLE, ROLE_ARM, StudyRuns
from lightning_moevlm.study.statistics.outcomes.stability import TRAIN_LOSS
from lightning_moevlm.tracking.links import server_command, ui_address, view_link

_COLOUR_TAG = "mlflow.runColor"
_VIEW = "moevlm"
_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"
_CHARTS_OF_FAMILY = 4  # of a deep model's layers: the first, the last and some between
_STABILITY = (metric_keys.GRAD_NORM, metric_keys.UPDATE_NORM, metric_keys.ATTENTION_LOGIT_MAX, metric_keys.LOGIT_MAX)
_EXPERT_LOAD = (metric_keys.MAX_VIOLATION, metric_keys.DEAD_EXPERTS)


def describe_view(experiment: StudyRuns) -> tuple[str, ...]:
    """Return the command that starts a server on the store, and the view's link; the link alone for a server."""
    command, address = server_command(experiment.uri), ui_address(experiment.uri)
    link = view_link(address, experiment.experiment_id, _VIEW)
    return (link,) if command is None else (command, link)


def log_view(experiment: StudyRuns, result: StudyResult) -> None:
    """Set the colours of a study's runs and its chart view.

    Raises:
        MlflowException: the store cannot be written.
    """
    from mlflow import MlflowClient

    client = MlflowClient(experiment.uri)
    looks = choose_looks(tuple(arm.arm.name for arm in result.arms), result.comparison.baseline)
    runs = [run for arm in result.arms for run in arm.runs]
    for run in runs:
        run_id, colour = run.state.run_id, looks[run.arm].colour
        if run_id is not None and run.tags.get(_COLOUR_TAG) != colour:
            client.set_tag(run_id, _COLOUR_TAG, colour)
    logged = {key: max(run.series[key].steps, default=0) for run in runs for key in run.series}
    state = json.dumps(view_state(result.comparison.primary.metric, logged), separators=(",", ":"))
    envelope = {
        "name": f"{result.comparison.name}: arms",
        "createdAt": 0,  # the same view whenever it is written
        "state": "deflate;" + base64.b64encode(zlib.compress(state.encode())).decode(),
    }
    client.set_experiment_tag(experiment.experiment_id, _VIEW_TAG, json.dumps(envelope))


def view_state(primary: str, logged: dict[str, int]) -> dict[str, Any]:
    """Return the state of the chart view.

    Args:
        primary: Key of the primary metric.
        logged: Last step of every metric that a run has logged.
    """
    sections = {
        "Primary metric": [primary],
        "Task loss": [key for key in (TRAIN_LOSS, metric_keys.TASK_LOSS.key(stage="val")) if key != primary],
        "Stability": _of_families(_STABILITY, logged),
        "Expert load": _of_families(_EXPERT_LOAD, logged),
    }
    charts = [
        _chart(key, section, is_line=logged[key] > 0)
        for section, keys in sections.items()
        for key in keys
        if key in logged
    ]
    drawn = {chart["metricSectionId"] for chart in charts}
    others = sorted({key.rpartition("/")[0] or "Model metrics" for key in logged})
    return {
        "searchFilter": f"tags.`{ROLE}` = '{ROLE_ARM}'",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "arm"}]},
        "useGroupedValuesInCharts": False,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "compareRunSections": [_section(name, True) for name in sections if name in drawn]
        + [_section(name, False) for name in others],
        "compareRunCharts": charts,
    }


def _of_families(families: Iterable[metric_keys.MetricKey], logged: Iterable[str]) -> list[str]:
    """Return the keys of each family, evenly chosen where they are many."""
    chosen = []
    for family in families:
        keys = sorted(key for key in logged if family.match(key) is not None)
        last = len(keys) - 1
        places = {round(i * last / (_CHARTS_OF_FAMILY - 1)) for i in range(_CHARTS_OF_FAMILY)} if keys else ()
        chosen += [keys[place] for place in sorted(places)]
    return chosen


def _section(name: str, is_open: bool) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": is_open, "isReordered": True, "deleted": False, "isGenerated": True}


def _chart(key: str, section: str, is_line: bool) -> dict[str, Any]:
    """Return a chart; the fields and their defaults are those that the UI itself saves."""
    common = {
        "uuid": f"{section}/{key}",
        "type": "LINE" if is_line else "BAR",
        "runsCountToCompare": 10,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": True,
        "displayName": key,
        "metricKey": key,
    }
    if not is_line:
        return common
    return common | {
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
