"""The state of MLflow's chart view, by hand; `tests/tracking/read/test_study_in_the_ui.py` opens one in a browser."""

from lightning_moevlm.study.report.mlflow_view import view_state


def test_view_shows_four_topics_and_closes_the_rest() -> None:
    layers = [f"{name}/block{block}/text" for block in range(1, 10) for name in ("max_violation", "router_logit_max")]
    logged = dict.fromkeys(["val/task_loss", "train/task_loss", "optim/grad_norm", *layers, "a_total", "x/y/z"], 40)
    state = view_state("val/task_loss", logged | {"model/total_parameters": 0})
    assert state["searchFilter"] == "tags.`role` = 'arm'"
    shown = {section["name"]: section["display"] for section in state["compareRunSections"]}
    assert [name for name, is_open in shown.items() if is_open] == [
        "Primary metric", "Task loss", "Stability", "Expert load",
    ]  # fmt: skip
    assert {"Model metrics", "model", "x/y", "optim"} <= shown.keys()  # where the UI puts the metrics that are left
    charts = {chart["metricKey"]: chart for chart in state["compareRunCharts"]}
    assert [key for key, chart in charts.items() if chart["metricSectionId"] == "Expert load"] == [
        f"max_violation/block{block}/text" for block in (1, 4, 6, 9)
    ]
    assert charts["train/task_loss"]["metricSectionId"] == "Task loss"
    assert len({chart["uuid"] for chart in charts.values()}) == len(charts) == 1 + 1 + 1 + 4 + 4


def test_a_metric_of_one_point_is_a_bar() -> None:
    [chart] = view_state("test/accuracy_text", {"test/accuracy_text": 0})["compareRunCharts"]
    assert (chart["type"], chart["metricSectionId"]) == ("BAR", "Primary metric")
