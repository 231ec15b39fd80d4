"""Finds the recordings of a run: in its folder, or among its artifacts."""

from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking.read.run_selection import SHOWN_DIGITS, choose_runs
from lightning_moevlm.tracking.recordings.recording import FOLDER
from lightning_moevlm.tracking.store import (
    describe_cause,
    has_store,
    open_client,
    prepare_store,
    resolve_tracking_uri,
    runs_dir,
    sqlite_path,
)

_ENDING = ".safetensors"


class FoundRecordings(NamedTuple):
    """Recordings and their run."""

    files: tuple[Path, ...]
    """By the step of their first event."""
    run_dir: Path | None
    """Folder of the run; None if it is not on this machine."""


def find_recordings(run: str, tracking_uri: str | None, downloads: Path) -> FoundRecordings:
    """Return the recordings of a run.

    Args:
        run: its folder, name or id, or the file of a recording.
        tracking_uri: store of the run; None is the one in force.
        downloads: where artifacts of a server go.

    Raises:
        UserError: there is no such run, its store does not answer, or it has no recording.
    """
    path = Path(run)
    if path.suffix == _ENDING:
        if not path.is_file():
            raise UserError(f"there is no file {run}; give a recording, or a run's folder, name or id")
        run_dir = path.absolute().parent.parent
        return FoundRecordings((path,), run_dir if (run_dir / "config").is_dir() else None)
    if path.is_dir():
        return FoundRecordings(_some(path / FOLDER, run), path)
    if len(path.parts) > 1:
        raise UserError(f"there is no folder {run}; give a run's folder, its name or id")
    store = resolve_tracking_uri(tracking_uri)
    if not has_store(store):
        raise UserError(
            f"there is no folder {run}, and no database {sqlite_path(store)} with run names; give the run's "
            "folder, or the store in MLFLOW_TRACKING_URI"
        )
    prepare_store(store)
    rows = choose_runs(store, [run])
    if len(rows) > 1:
        ids = ", ".join(row.run_id[:SHOWN_DIGITS] for row in rows[:4])
        raise UserError(f"{run} names {len(rows)} runs ({ids}, ...): give one of their ids")
    run_dir = runs_dir(store) / rows[0].experiment_id / rows[0].run_id
    if (run_dir / FOLDER).is_dir():
        return FoundRecordings(_some(run_dir / FOLDER, run), run_dir)
    return FoundRecordings(_download(store, rows[0].run_id, run, downloads), run_dir if run_dir.is_dir() else None)


def _download(store: str, run_id: str, run: str, target: Path) -> tuple[Path, ...]:
    from mlflow.exceptions import MlflowException

    client = open_client(store)
    try:
        if not client.list_artifacts(run_id, FOLDER):
            raise _nothing(run)
        folder = Path(client.download_artifacts(run_id, FOLDER, str(target)))
    except MlflowException as error:
        raise UserError(
            f"the recordings of {run} cannot be read from its store ({describe_cause(error)}): copy the run's folder "
            "here and give it"
        ) from error
    return _some(folder, run)


def _some(folder: Path, run: str) -> tuple[Path, ...]:
    files = tuple(sorted(folder.glob(f"*{_ENDING}")))
    if not files:
        raise _nothing(run)
    return files


def _nothing(run: str) -> UserError:
    return UserError(
        f"run {run} has no recording: no spike, loss that is not finite, frozen expert, skipped step, rollback or "
        "crash was seen, or its flight recorder was off"
    )
