"""A run in MLflow, written while it trains.

Lightning's MLFlowLogger writes every call at once, to a store that MLflow no longer opens by default, and
moves the process's global tracking URI. This one buffers, keeps to its own client, survives a store that goes
away, and says where it could not keep what it was given.
"""

import math
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
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
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.store import prepare_store, resolve_tracking_uri, runs_dir, sqlite_path
from lightning_moevlm.tracking.write.image_series import write_series_image
from lightning_moevlm.tracking.write.metric_names import LONGEST_NAME, MetricNames
from lightning_moevlm.tracking.write.offline_log import Address, OfflineLog
from lightning_moevlm.tracking.write.open_run import (
    NONFINITE_TAG,
    OpenRun,
    create_run,
    experiment_of_environment,
    local_artifacts,
    reopen_run,
)
from lightning_moevlm.tracking.write.point_buffer import PointBuffer
from lightning_moevlm.tracking.write.rewind import drop_points
from lightning_moevlm.tracking.write.run_params import CHANGED_TAG, sort_params
from lightning_moevlm.tracking.write.run_writer import METRICS_PER_WRITE, RunWriter
from lightning_moevlm.tracking.write.store_outage import OutageGuard

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from PIL.Image import Image

_EXPERIMENT = "moevlm"
_DIVERGED = metric_keys.FIRST_NONFINITE_STEP.key()


class RunLogger(MLFlowLogger):
    """Logs one run; nothing is created before the first access to `experiment`, and only on rank 0.

    Points that are not finite are kept: NaN as NaN, infinities as MLflow keeps them (the largest float;
    `runs` reads them back as infinities). The first of each metric is also a tag, `nonfinite/<metric>`, for
    searches to find.

    Args:
        experiment_name: the experiment to log to, made if there is none; None = that of MLFLOW_EXPERIMENT_NAME or
            MLFLOW_EXPERIMENT_ID, else `moevlm`. Ignored when `run_id` is given.
        run_name: shown in the UI; None = the local time of its start. Ignored when `run_id` is given.
        tracking_uri: see `resolve_tracking_uri`.
        tags: tags of the run.
        run_id: continue this run; None = that of MLFLOW_RUN_ID, for the first logger of the process, unless an
            experiment is named. Params that differ from its own become tags `changed_param/<key>`, since params are
            immutable.
        artifact_location: where a new experiment keeps its files; None = `artifacts/<experiment>` beside the
            SQLite file, or a server's own choice.
        flush_points: write when this many points wait.
        flush_seconds: write when the last write is this many seconds ago.

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
        # Not MLFlowLogger's own: it opens the store at once and on every rank, which creates a database for a
        # fast_dev_run that logs nothing and races on a fresh one.
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
        self._writer: RunWriter | None = None
        self._offline_log: OfflineLog | None = None
        self._guard = OutageGuard(self._tracking_uri, _warn, "training goes on, what it logs is kept on disk")
        self._params: dict[str, str] = {}
        self._names = MetricNames()
        self._logged_until: Mapping[str, int] = {}  # steps that a server has, and that a resumed run logs again
        self._has_diverged = False
        self._buffer = PointBuffer(flush_points, flush_seconds)
        self._nonfinite_seen: set[str] = set()
        self._nonfinite_tags: dict[str, str] = {}  # not written yet

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> "MlflowClient":
        """MLflow's client; the first access prepares the store and creates or reopens the run.

        Raises:
            UserError: see the class.
        """
        return self._write.client

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
        """This run's local directory: checkpoints, configurations, what was not delivered. Rank 0 only."""
        assert self.experiment_id is not None and self.run_id is not None
        return Path(self.save_dir) / self.experiment_id / self.run_id

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep the points of a step, to be written when due. A text is skipped with a warning."""
        time_ms = int(time.time() * 1000)
        at = step or 0
        safe, add = self._names.safe, self._buffer.add
        self._has_diverged |= _DIVERGED in metrics
        for name, value in metrics.items():
            if isinstance(value, str):
                rank_zero_warn(f"metric {name} is the text {value!r}: not logged", category=RuntimeWarning)
                continue
            key, number = safe(name), float(value)
            if at <= self._logged_until.get(key, -1):
                continue
            add(Point(key, at, number, time_ms))
            if not math.isfinite(number) and key not in self._nonfinite_seen:
                self._nonfinite_seen.add(key)
                self._nonfinite_tags[f"{NONFINITE_TAG}{key}"[:LONGEST_NAME]] = f"{number} first at step {at}"
        if self._buffer.due:
            self.flush()
        elif self._guard.reason:
            self._keep_waiting()

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Let the steps beyond one be logged anew by a run that is resumed there; see `rewind.drop_points`."""
        if not self._resumed:
            return
        client = self._write.client

        def drop() -> None:
            assert self._run_id is not None
            self._logged_until = drop_points(client, self._tracking_uri, self._run_id, step)
            if not self._logged_until:
                self._nonfinite_seen = set()

        if self._guard.attempt(drop) and self._logged_until:
            _warn(
                f"run {self._run_id} is resumed at step {step} and has points up to step "
                f"{max(self._logged_until.values())}: a server forgets none, so these stay and are not logged again; "
                "if options have changed, leave run_id out and begin a new run"
            )

    @rank_zero_only
    def log_from_thread(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep points without ever writing: safe beside the training thread, which delivers them."""
        time_ms = int(time.time() * 1000)
        for name, value in metrics.items():
            self._buffer.add(Point(self._names.safe(name), step, float(value), time_ms))

    @rank_zero_only
    def flush(self) -> None:
        """Write what waits. A store that does not answer is warned about once and tried again later."""
        writer, log = self._write, self._kept

        def older() -> None:
            log.deliver(writer, has_ended=False)
            if self._nonfinite_tags:
                writer.tags(self._nonfinite_tags)
                self._nonfinite_tags = {}

        if not self._guard.attempt(lambda: self._buffer.deliver(writer.points, METRICS_PER_WRITE, older)):
            self._keep_waiting()
            log.sync()

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log params under dotted keys, secrets masked; one that exists with another value becomes a tag.

        Values longer than MLflow takes (6,000 characters) are cut there, and whole in the artifact
        `params/<key>.txt`.
        """
        writer, log = self._write, self._kept
        found = sort_params(params, self._params)
        if not (log.is_empty and self._guard.attempt(lambda: writer.params(found.new))):
            log.keep_params(found.new)
        self._params |= found.new
        self.log_tags({f"{CHANGED_TAG}{key}"[:LONGEST_NAME]: value for key, value in found.changed.items()})
        for key, whole in found.too_long.items():
            self.log_artifact_text(f"params/{key}.txt", whole)

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; an existing one is replaced."""
        writer, log = self._write, self._kept
        if not (log.is_empty and self._guard.attempt(lambda: writer.tags(tags))):
            log.keep_tags(tags)

    @rank_zero_only
    def log_artifact_text(self, name: str, text: str) -> None:
        """Keep a text as artifact `name`, a relative path with `/`."""
        self._deliver_file(name, lambda path: path.write_text(text, encoding="utf-8"))

    @rank_zero_only
    def log_figure(self, name: str, figure: "Figure") -> None:
        """Keep a matplotlib figure as artifact `name`; the ending (`.png`, `.svg` ...) chooses the format."""
        self._deliver_file(name, lambda path: figure.savefig(path, bbox_inches="tight"))

    @rank_zero_only
    def log_image(self, key: str, image: "Image", step: int) -> None:
        """Keep a picture of a series; the UI shows the series with a slider over steps."""
        with tempfile.TemporaryDirectory() as directory:
            tags = write_series_image(Path(directory), image, self._names.safe(key), step)
            self._deliver_files(Path(directory), "")
        self.log_tags(tags)

    @rank_zero_only
    def log_directory(self, directory: Path, artifact_path: str) -> None:
        """Keep every file below a directory, which stays, as artifacts under `artifact_path`."""
        self._deliver_files(directory, f"{artifact_path}/")

    @override
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Write what waits: a checkpoint and the points before it belong together."""
        if self._writer is not None:
            self.flush()

    @override
    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write what waits and set the status: FINISHED, FAILED (as a run that diverged), or KILLED by a signal.

        What the store does not take stays in `run_dir`, with a warning that says how it gets there.
        """
        if self._writer is None and not len(self._buffer):
            return  # the run was never opened: fast_dev_run, or the store was refused
        writer, log = self._write, self._kept
        self.flush()
        # Lightning says "failed" from within its except block, whatever the exception is.
        killed = isinstance(sys.exc_info()[1], (KeyboardInterrupt, SIGTERMException))
        ending = "KILLED" if killed and status == "failed" else "FINISHED"
        if self._has_diverged or (status == "failed" and not killed):
            ending = "FAILED"
        now_ms = int(time.time() * 1000)
        if not (log.is_empty and self._guard.attempt(lambda: writer.ending(ending, now_ms))):
            log.keep_ending(ending, now_ms)
            log.sync()
            waiting = log.count()
            _warn(
                f"{waiting.points} points and {waiting.files} files of run {self.run_id} were not delivered to "
                f"{mask_url_secrets(self._tracking_uri)}; they are in {log.journal}. Once it answers: "
                f"moevlm sync {self.run_dir}"
            )
        log.release()

    @property
    def _kept(self) -> OfflineLog:
        if self._offline_log is None:
            assert self.run_id is not None
            self._offline_log = OfflineLog(self.run_dir, Address(mask_url_secrets(self._tracking_uri), self.run_id))
        return self._offline_log

    def _keep_waiting(self) -> None:
        """Move to the disk what waits for a store that does not answer; a kill would lose it here."""
        try:
            self._kept.keep_tags(self._nonfinite_tags)
            self._nonfinite_tags = {}
            self._buffer.spill(self._kept.keep_points)
        except OSError as error:  # no space, say: it stays in memory, and training goes on
            rank_zero_warn(f"what MLflow does not take cannot be kept in {self.run_dir}: {error}")

    @property
    def _write(self) -> RunWriter:
        if self._writer is None:
            from mlflow import MlflowClient

            prepare_store(self._tracking_uri)
            client = MlflowClient(self._tracking_uri)
            run = self._open(client)
            self._run_id, self._experiment_id = run.run_id, run.experiment_id
            self._params, self._nonfinite_seen = dict(run.params), set(run.nonfinite)
            self._writer = RunWriter(client, run.run_id)
            if not self._kept.is_empty:  # a process before this one, killed while the store was silent, left it
                self.flush()
            if self._resumed:
                self.log_tags(self._run_tags)
        return self._writer

    def _open(self, client: "MlflowClient") -> OpenRun:
        if self._run_id is not None:
            if os.environ.get("MLFLOW_RUN_ID") == self._run_id:
                del os.environ["MLFLOW_RUN_ID"]  # as MLflow does: the next run of this process is another one
            return reopen_run(client, self._run_id, self._tracking_uri)
        name = self._experiment or experiment_of_environment(client) or _EXPERIMENT
        location = self._artifact_location
        if location is None and sqlite_path(self._tracking_uri) is not None:
            location = local_artifacts(Path(self.save_dir), name)
        return create_run(client, name, location, self._run_name, self._run_tags)

    def _deliver_file(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file and hand it over."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            self._deliver_files(Path(directory), "")

    def _deliver_files(self, directory: Path, prefix: str) -> None:
        """Hand every file below a directory to the store as `prefix` + its path; what that does not take is kept."""
        writer, log = self._write, self._kept
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = prefix + path.relative_to(directory).as_posix()
            if not (log.is_empty and self._guard.attempt(partial(writer.file, path, name))):
                log.keep_file(path, name)


def _warn(line: str) -> None:
    rank_zero_warn(line, category=RuntimeWarning)
