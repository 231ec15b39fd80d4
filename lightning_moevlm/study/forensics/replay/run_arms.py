"""Runs the arms of a replay, one after the other, each as an MLflow run of its own.

A finished arm is found again by the digest of all that it depends on, so the same command resumes after any
interruption. Arms run one by one because threads change the order of sums, and so the last bits.
"""

import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.digest import digest_text
from lightning_moevlm.common.errors import Stopped
from lightning_moevlm.study.forensics.replay.arms import Arm
from lightning_moevlm.study.run.engines import Engine, Job
from lightning_moevlm.study.run.processes.child_process import ProcessEnd
from lightning_moevlm.study.run.processes.command_line import moevlm_command
from lightning_moevlm.study.run.processes.run_files import log_tail
from lightning_moevlm.study.run.processes.stop_signals import catch_stop_signals
from lightning_moevlm.tracking.read.runs import RunRow, find_runs_anywhere
from lightning_moevlm.tracking.record.provenance import code_digest
from lightning_moevlm.tracking.recordings.recording import REPLAY_FILE, REPLAY_FOLDER
from lightning_moevlm.tracking.store import open_client, runs_dir

REPLAYS_TAG, STEP_TAG, DIGEST_TAG = "replays", "replay_step", "replay_digest"
_MISTAKE = "moevlm: error: "


@dataclass(frozen=True)
class Setting:
    """What all arms of a replay share."""

    store: str
    """Tracking URI."""
    run: RunRow
    """The run that is replayed."""
    step: int
    """That of the event."""
    last_step: int
    checkpoint: Path | None
    """None replays from the start."""
    words: Callable[[Arm, Mapping[str, str]], list[str]]
    """Makes the command line of an arm, with the tags of its run."""
    environment: Mapping[str, str]
    logs: Path
    """Folder of the logs."""


class ArmRun(NamedTuple):
    """A replayed arm."""

    arm: Arm
    run_id: str | None
    """In MLflow; None if it was refused."""
    recording: Path | None
    refusal: str
    """Why it could not be replayed, or ""."""


def run_arms(arms: Sequence[Arm], setting: Setting, engine: Engine, show: Callable[[str], None]) -> list[ArmRun]:
    """Run the arms that are missing, and return all.

    Raises:
        Stopped: a signal ended it; the finished arms stay.
    """
    setting.logs.mkdir(parents=True, exist_ok=True)
    engine.open(setting.logs, 1, len(arms))
    try:
        with catch_stop_signals() as stop:
            done = []
            for arm in arms:
                found = find_arm(arm, setting)
                if found is None:
                    show(f"replaying up to step {setting.last_step}: {arm.name}")
                    end = _run(arm, setting, engine, lambda: stop.name)
                    if stop.name:
                        raise Stopped(signal.Signals[stop.name], f"stopped by {stop.name}; the same command resumes")
                    found = find_arm(arm, setting) or ArmRun(arm, None, None, _explain(arm, setting, end))
                done.append(found)
            return done
    finally:
        engine.close()


def keep_picture(store: str, run_id: str, file: Path) -> None:
    """Keep a picture as an artifact of a run."""
    open_client(store).log_artifact(run_id, str(file), REPLAY_FOLDER)


def log_file(arm: Arm, setting: Setting) -> Path:
    """Return the log of an arm."""
    return setting.logs / f"{_digest(arm, setting)}.txt"


def _run(arm: Arm, setting: Setting, engine: Engine, is_stopped: Callable[[], str]) -> ProcessEnd | None:
    digest = _digest(arm, setting)
    tags = {
        REPLAYS_TAG: setting.run.run_id,
        STEP_TAG: str(setting.step),
        DIGEST_TAG: digest,
        "arm": arm.name,
        "role": "replay",
    }
    job = Job(
        ticket=f"{digest}-{time.time_ns()}",
        name=arm.name,
        command=tuple(moevlm_command(setting.words(arm, tags))),
        again=(),
        environment={"MLFLOW_TRACKING_URI": setting.store, "MLFLOW_RUN_ID": "", **setting.environment},
        folder=Path.cwd(),
        log=log_file(arm, setting).absolute(),
        checkpoints=(),
        timeout_seconds=None,
    )
    engine.submit(job)
    while (end := engine.poll(job.ticket)) is None:
        if is_stopped():
            engine.cancel([job.ticket])
            return None
        time.sleep(engine.poll_seconds)
    return end


def find_arm(arm: Arm, setting: Setting) -> ArmRun | None:
    """Return the newest finished run of an arm."""
    for row in reversed(find_runs_anywhere(setting.store, {DIGEST_TAG: _digest(arm, setting)})):
        recording = runs_dir(setting.store) / row.experiment_id / row.run_id / REPLAY_FOLDER / REPLAY_FILE
        if recording.is_file():
            return ArmRun(arm, row.run_id, recording, "")
    return None


def _digest(arm: Arm, setting: Setting) -> str:
    place = setting.checkpoint and setting.checkpoint.stat()
    start = [place.st_size, place.st_mtime_ns] if place else None  # a hard link has those of its file
    files = [word for before, word in pairwise(("", *arm.words)) if before == "-c"]
    contents = [Path(file).read_text("utf-8") for file in files]
    what = [setting.run.run_id, start, setting.last_step, arm.name, arm.words, contents, code_digest()]
    return digest_text(json.dumps([*what, sorted(setting.environment.items())]))


def _explain(arm: Arm, setting: Setting, end: ProcessEnd | None) -> str:
    file = log_file(arm, setting)
    lines = log_tail(file)
    mistakes = [line.removeprefix(_MISTAKE) for line in lines if line.startswith(_MISTAKE)]
    code = "" if end is None else f" with code {end.code}"
    return mistakes[-1] if mistakes else f"it ended{code}: see {file}"
