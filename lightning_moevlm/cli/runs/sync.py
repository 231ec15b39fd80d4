"""`moevlm sync`: upload logs that runs kept locally while MLflow was unreachable."""

from pathlib import Path

from lightning_moevlm.cli.output import console, show
from lightning_moevlm.common.errors import UserError


def sync(folder: str | None = None, json: str | None = None, dry_run: bool = False) -> int:
    """Upload metrics, tags and files that runs kept locally while MLflow was unreachable. Safe to repeat.

    A run in progress uploads by itself. `moevlm sweep run|status|report` uploads for the runs of a study.
    `moevlm sync FOLDER` is short for --folder FOLDER.

    Args:
        folder: A run's folder or one above it; by default the folder of the current MLflow store, e.g. runs.
        json: Write one record per run to this file as JSON; - is standard output.
        dry_run: Show pending uploads, upload nothing.
    """
    from rich import box
    from rich.table import Table

    from lightning_moevlm.tracking.store import resolve_tracking_uri, runs_dir
    from lightning_moevlm.tracking.write.offline_log import find_offline_logs
    from lightning_moevlm.tracking.write.sync_offline_logs import SyncResult, sync_offline_logs

    uri = resolve_tracking_uri(None)
    where = runs_dir(uri) if folder is None else Path(folder)
    if folder is not None and not where.is_dir():
        raise UserError(f"no such folder: {folder}; give a run's, which a run prints at its end, or one above it")
    logs = find_offline_logs(where)
    rows = [SyncResult(log, log.count(), "dry run") for log in logs] if dry_run else sync_offline_logs(logs, uri)
    if not rows and json is None:
        console().print(f"Nothing to upload in {where.absolute()}.", highlight=False, soft_wrap=True)
        return 0
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("run", "points", "files", "outcome", "store"):
        table.add_column(heading, overflow="fold")
    records: list[dict[str, object]] = []
    for log, pending, reason in rows:
        store, run_id = log.address
        outcome = "kept" if reason else "uploaded"
        table.add_row(run_id, str(pending.points), str(pending.files), f"{outcome}: {reason}".strip(" :"), store)
        records.append(
            {
                "run_id": run_id,
                "run_dir": str(log.run_dir),
                "store": store,
                "points": pending.points,
                "files": pending.files,
                "outcome": outcome,
                "reason": reason,
            }
        )
    show(table, records, json)
    return 0 if dry_run or not any(row.reason for row in rows) else 1
