"""Logs a run to MLflow while it trains.

Lightning's MLFlowLogger writes every call at once, to a store that MLflow no longer opens by default, and
moves the process's global tracking URI. This one writes to an offline log on disk, from which a thread fills MLflow. It
keeps to its own client and survives a store that goes away.
"""

import math
import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from typing_extensions import override

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.tracking.store import (
    describe_cause,
    has_store,
    open_client,
    prepare_store,
    resolve_tracking_uri,
    runs_dir,
    sqlite_path,
)
from lightning_moevlm.tracking.write.metric_names import LONGEST_NAME, MetricNames
from lightning_moevlm.tracking.write.offline_log import Address, OfflineLog, find_offline_logs
from lightning_moevlm.tracking.write.open_run import (
    NONFINITE_TAG,
    OpenRun,
    create_run,
    experiment_of_environment,
    local_artifacts,
    reopen_run,
    unknown_run,
)
from lightning_moevlm.tracking.write.run_params import CHANGED_TAG, sort_params
from lightning_moevlm.tracking.write.run_writer import RunWriter
from lightning_moevlm.tracking.write.sender import Sender
from lightning_moevlm.tracking.write.store_outage import OutageGuard

if TYPE_CHECKING:
    from mlflow import MlflowClient

_EXPERIMENT = "moevlm"
_DIVERGED = metric_keys.FIRST_NONFINITE_STEP.key()


class RunLogger(MLFlowLogger):
    """Logs one run, on rank 0 only. Nothing is created before its first use.

    NaN is kept as NaN, infinities as MLflow keeps them (the largest float; `runs` reads infinities back). The first of
    each metric is also a tag, `nonfinite/<metric>`, for searches.

    Args:
        experiment_name: Experiment to log to, created if missing; null takes that of MLFLOW_EXPERIMENT_NAME or
            MLFLOW_EXPERIMENT_ID, else `moevlm`. Ignored when `run_id` is given.
        run_name: Name in the UI; null takes the local time of its start. Ignored when `run_id` is given.
        tracking_uri: MLflow's address, sqlite:///PATH or http(s)://HOST:PORT; null takes MLFLOW_TRACKING_URI, else
            sqlite:///runs/mlflow.db.
        tags: Tags of the run.
        run_id: Run to continue; null takes that of MLFLOW_RUN_ID, for the first logger of the process, unless an
            experiment is named. Params that differ become tags `changed_param/<key>`: params are immutable.
        artifact_location: Where a new experiment keeps its files; null is `artifacts/<experiment>` beside the SQLite
            file, or a server's own choice.
        flush_points: Number of pending points that starts an upload.
        flush_seconds: Seconds between uploads of pending points; 0 uploads at every call.

    Raises:
        UserError: the tracking URI cannot be used; on first access what `prepare_store`, `create_run` and
            `reopen_run` raise.
    """

    def __init__(
        self,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, str] | None = None,
        run_id: str | None = None,
        artifact_location: str | None = None,
        flush_points: int = 500,
        flush_seconds: float = 5.0,
    ) -> None:
        # Not MLFlowLogger's own: it opens the store at once and on every rank. That creates a database for a
        # fast_dev_run, which logs nothing, and races on a fresh one.
        Logger.__init__(self)
        if flush_points < 1:
            raise UserError(f"flush_points is {flush_points}: give at least 1")
        if flush_seconds < 0:
            raise UserError(f"flush_seconds is {flush_seconds}: give 0 or more seconds")
        self._tracking_uri = resolve_tracking_uri(tracking_uri)
        self._experiment = experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        self._run_name = run_name
        if run_id is None and experiment_name is None:
            run_id = os.environ.get("MLFLOW_RUN_ID") or None
        self._run_id = run_id
        self._artifact_location = artifact_location
        self._experiment_id: str | None = None
        self._run_tags = dict(tags or {})
        self._resumed = run_id is not None
        self._client: MlflowClient | None = None
        self._sender: Sender | None = None
        self._flush_points, self._flush_seconds = flush_points, flush_seconds
        self._guard = OutageGuard(self._tracking_uri, _warn, "training continues, its log is kept on disk")
        self._params: dict[str, str] = {}
        self._names = MetricNames()
        self._has_diverged = False
        self._has_full_disk = False
        self._nonfinite_seen: set[str] = set()

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> "MlflowClient":
        """MLflow's client; the first access prepares the store and creates or reopens the run.

        Raises:
            UserError: see the class.
        """
        return self._connect()

    @property
    def tracking_uri(self) -> str:
        """The URI in force."""
        return self._tracking_uri

    @property
    @override
    def save_dir(self) -> str:
        """Absolute directory under which Lightning puts `<experiment id>/<run id>/checkpoints`."""
        return str(runs_dir(self._tracking_uri))

    @property
    def run_dir(self) -> Path:
        """This run's local directory: checkpoints, configurations, offline logs. Rank 0 only."""
        assert self.experiment_id is not None and self.run_id is not None
        return Path(self.save_dir) / self.experiment_id / self.run_id

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the points of a step, from any thread. A text is skipped with a warning."""
        sender, at = self._open(), step or 0
        safe, points = self._names.safe, dict[str, float]()
        nonfinite: dict[str, str] = {}
        self._has_diverged |= _DIVERGED in metrics
        for name, value in metrics.items():
            if isinstance(value, str):
                rank_zero_warn(f"metric {name} is the text {value!r}: not logged", category=RuntimeWarning)
                continue
            key, number = safe(name), float(value)
            points[key] = number
            if not math.isfinite(number) and key not in self._nonfinite_seen:
                self._nonfinite_seen.add(key)
                nonfinite[f"{NONFINITE_TAG}{key}"[:LONGEST_NAME]] = f"{number} first at step {at}"
        self._report(sender.log.append(metrics=points, step=at, time_ms=_now_ms()))
        sender.notice(len(points))
        self.log_tags(nonfinite)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Let the steps beyond one be logged anew by a run that is resumed there; see `rewind.drop_points`."""
        if not self._resumed:
            return
        self._append(rewind=step)
        if sqlite_path(self._tracking_uri) is not None:  # a server keeps its points, and the tags that tell of them
            self._nonfinite_seen = set()
        self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Write what is pending now. A store that does not take it is warned about once and tried again later."""
        self._open().flush()

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log params under dotted keys, secrets masked; one that exists with another value becomes a tag.

        Values longer than MLflow takes (6,000 characters) are cut there, and whole in the artifact
        `params/<key>.txt`.
        """
        self._open()
        found = sort_params(params, self._params)
        if found.new:
            self._append(params=found.new)
        self._params |= found.new
        self.log_tags({f"{CHANGED_TAG}{key}"[:LONGEST_NAME]: value for key, value in found.changed.items()})
        for key, whole in found.too_long.items():
            self.log_artifact_text(f"params/{key}.txt", whole)

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; an existing one is replaced."""
        if tags:
            self._append(tags=dict(tags))

    @rank_zero_only
    def log_artifact_text(self, name: str, text: str) -> None:
        """Keep a text as artifact `name`, a relative path with `/`."""
        with self._add_files() as folder:
            _place(folder / name).write_text(text, encoding="utf-8")

    @rank_zero_only
    def log_directory(self, directory: Path, artifact_path: str) -> None:
        """Keep every file below a directory, which stays, as artifacts under `artifact_path`."""
        with self._add_files() as folder:
            shutil.copytree(directory, folder / artifact_path)

    @rank_zero_only
    def log_file(self, file: Path, artifact_path: str) -> None:
        """Keep a file, which stays, as an artifact under `artifact_path`; one of the same name is replaced."""
        with self._add_files() as folder:
            shutil.copyfile(file, _place(folder / artifact_path / file.name))

    @override
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Do nothing: the offline log lies beside the checkpoint and has every point from before it."""

    @override
    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write what is pending and set the status: FINISHED, FAILED (as a run that diverged), or KILLED by a signal.

        What the store does not take stays in `run_dir`, with a warning that names the command to upload it.
        """
        sender = self._sender
        if sender is None:
            return  # the run was never opened: fast_dev_run, or the store was refused
        # Lightning says "failed" from within its except block, whatever the exception is.
        killed = isinstance(sys.exc_info()[1], (KeyboardInterrupt, SIGTERMException))
        ending = "KILLED" if killed and status == "failed" else "FINISHED"
        if self._has_diverged or (status == "failed" and not killed):
            ending = "FAILED"
        self._append(status=ending, end_ms=_now_ms())
        self._sender = None
        if not sender.close(has_ended=True):
            pending, lost = sender.log.count(), sender.log.num_in_memory
            rest = f". {lost} more lines found no room there and are lost" if lost else ""
            _warn(
                f"{pending.points} points and {pending.files} files of run {self.run_id} were not uploaded to "
                f"{mask_url_secrets(self._tracking_uri)}; they are in {sender.log.folder}. Once it answers: "
                f"moevlm sync {self.run_dir}{rest}"
            )

    def _append(self, **entry: Any) -> None:
        sender = self._open()
        self._report(sender.log.append(**entry))
        sender.notice()

    @contextmanager
    def _add_files(self) -> Iterator[Path]:
        sender = self._open()
        with sender.log.add_files() as folder:
            yield folder
        sender.notice()

    def _report(self, error: OSError | None) -> None:
        """Warn once of a disk that does not take the log; it stays in memory, and training continues."""
        if error is not None and not self._has_full_disk:
            self._has_full_disk = True
            _warn(f"the log of run {self.run_id} cannot be kept in {self.run_dir} ({error.strerror}): free disk space")

    def _connect(self) -> "MlflowClient":
        """Return the client; the first time, open the run in MLflow and begin to log."""
        if self._client is None:
            from mlflow.exceptions import MlflowException

            if self._run_id is not None and not has_store(self._tracking_uri):
                raise unknown_run(self._run_id, self._tracking_uri)
            prepare_store(self._tracking_uri)
            client = open_client(self._tracking_uri)
            try:
                run = self._open_run(client)
            except MlflowException as error:
                uri = mask_url_secrets(self._tracking_uri)
                raise UserError(
                    f"MLflow at {uri} cannot create or resume the run ({describe_cause(error)}): free disk space or "
                    "grant write permission for its database, then repeat the command"
                ) from error
            self._run_id, self._experiment_id = run.run_id, run.experiment_id
            self._params, self._nonfinite_seen = dict(run.params), set(run.nonfinite)
            self._client = client
            try:
                self._open()
            except UserError:  # its folder cannot be written
                client.set_terminated(run.run_id, "FAILED")
                raise
            if self._resumed:
                self.log_tags(self._run_tags)
        return self._client

    def _open(self) -> Sender:
        """Return what sends the log; begin a new log at first, and after the run has been ended."""
        client = self._connect()
        if self._sender is None:
            assert self._run_id is not None
            log = OfflineLog.begin(self.run_dir, Address(mask_url_secrets(self._tracking_uri), self._run_id))
            earlier = [each for each in find_offline_logs(self.run_dir) if each.hold()]
            make_writer = partial(RunWriter, client, self._tracking_uri, self._run_id, _warn)
            self._sender = Sender(log, earlier, make_writer, self._guard, self._flush_points, self._flush_seconds)
            self._sender.start()
            if earlier:
                self._sender.flush()
        return self._sender

    def _open_run(self, client: "MlflowClient") -> OpenRun:
        if self._run_id is not None:
            if os.environ.get("MLFLOW_RUN_ID") == self._run_id:
                del os.environ["MLFLOW_RUN_ID"]  # as MLflow does: the next run of this process is another one
            return reopen_run(client, self._run_id, self._tracking_uri)
        name = self._experiment or experiment_of_environment(client) or _EXPERIMENT
        location = self._artifact_location
        if location is None and sqlite_path(self._tracking_uri) is not None:
            location = local_artifacts(Path(self.save_dir), name)
        return create_run(client, name, location, self._run_name, self._run_tags)


def _place(file: Path) -> Path:
    """Return the file after its folder was made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _now_ms() -> int:
    return int(time.time() * 1000)


def _warn(line: str) -> None:
    rank_zero_warn(line, category=RuntimeWarning)
