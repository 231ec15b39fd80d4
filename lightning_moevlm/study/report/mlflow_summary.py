"""Logs the report to MLflow, on one summary run per study, which is used again for a new report.

MLflow's charts cannot show tables or artifacts of many runs. So the report hangs on a run of its own (tag
role=summary): verdicts are its description, tables and figures its artifacts.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from lightning_moevlm.study.report.make_report import Report
from lightning_moevlm.study.report.write_report import MARKDOWN_FILE, table_file
from lightning_moevlm.study.run.mlflow_runs import ROLE, StudyRuns
from lightning_moevlm.tracking.read.runs import find_runs

ROLE_SUMMARY = "summary"
_NOTE = "mlflow.note.content"
_TABLES = "mlflow.loggedArtifacts"
_ARTIFACTS = "report"
_MANY_FINDINGS = 20  # MLflow cuts a description off at 8,000 characters


def log_summary(experiment: StudyRuns, report: Report, folder: Path) -> str:
    """Log the written report and its verdicts to the summary run; return that run's id.

    Args:
        experiment: The study's runs.
        report: The report.
        folder: The folder that it was written to.
    """
    from mlflow import MlflowClient

    client = MlflowClient(experiment.uri)
    tables = [{"path": f"{_ARTIFACTS}/{table_file(table)}", "type": "table"} for table in report.tables]
    study = report.result.comparison
    rest = len(report.finding) - _MANY_FINDINGS
    more = (f"... and {rest} more in the report",) if rest > 0 else ()
    verdicts = "\n".join(f"- {line}" for line in (*report.finding[:_MANY_FINDINGS], *more, report.learned))
    note = f"**{study.question}**\n\n{verdicts}\n\nSee artifacts, `{_ARTIFACTS}/{MARKDOWN_FILE}`."
    client.set_experiment_tag(experiment.experiment_id, _NOTE, f"**{study.question}**\n\n{study.hypothesis}")
    complete = str(report.result.complete).lower()
    return log_to_summary(experiment, folder, {_TABLES: json.dumps(tables), _NOTE: note, "complete": complete})


def log_to_summary(experiment: StudyRuns, folder: Path, tags: Mapping[str, str]) -> str:
    """Log a folder and tags to the experiment's summary run, which is created if there is none; return its id."""
    from mlflow import MlflowClient

    client = MlflowClient(experiment.uri)
    own = {"sweep": experiment.name, ROLE: ROLE_SUMMARY}
    found = find_runs(experiment.uri, experiment.name, own)
    if found:
        run_id = found[0].run_id
    else:
        run = client.create_run(experiment.experiment_id, tags=own, run_name=f"{experiment.name} summary")
        run_id = str(run.info.run_id)
    client.log_artifacts(run_id, str(folder), _ARTIFACTS)
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    client.set_terminated(run_id, "FINISHED")
    return run_id
