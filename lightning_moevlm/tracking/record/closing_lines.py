"""Writes the lines that a run prints when it ends: where everything is, and how to resume or measure it."""

import shlex
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moevlm.tracking.links import run_link, server_command, ui_address
from lightning_moevlm.tracking.read.run_selection import SHOWN_DIGITS
from lightning_moevlm.tracking.store import resolve_tracking_uri
from lightning_moevlm.tracking.write.run_logger import RunLogger


def closing_lines(uri: str, experiment_id: str, run_id: str, run_dir: Path) -> tuple[str, ...]:
    """Return the lines to print after a run; a store that is a server needs no second line to start one."""
    server = server_command(uri)
    word = run_argument(uri, run_id, run_dir)
    return (
        f"Checkpoints and configuration: {run_dir}",
        *(() if server is None else (f"MLflow: {server}",)),
        f"{'MLflow:' if server is None else '       '} {run_link(ui_address(uri), experiment_id, run_id)}",
        f"Evaluate or resume: moevlm test --run {word}, moevlm fit --run {word}",
    )


def run_argument(uri: str, run_id: str, run_dir: Path) -> str:
    """Return the argument of `--run` for a run: its first digits, or its folder in a store that only its file names."""
    return run_id[:SHOWN_DIGITS] if uri == resolve_tracking_uri(None) else shlex.quote(str(run_dir))


def checkpoint_lines(trainer: Trainer) -> tuple[str, ...]:
    """Return the lines to print after a run without MLflow."""
    last = _last_checkpoint(trainer)
    if last is None:
        return ()
    folder = last.parent.parent
    if not (folder / "config").is_dir():
        return (f"Checkpoints: {last.parent}",)
    word = shlex.quote(str(folder))
    return (
        f"Checkpoints and configuration: {folder}",
        f"Evaluate or resume: moevlm test --run {word}, moevlm fit --run {word}",
    )


def resume_line(trainer: Trainer) -> str:
    """Return how to resume a run that ended early, or "" where it has no checkpoint or no configuration."""
    last = _last_checkpoint(trainer)
    if last is None:
        return ""
    logger = next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
    if logger is not None and logger.run_id is not None:
        return f"Resume with: moevlm fit --run {run_argument(logger.tracking_uri, logger.run_id, logger.run_dir)}"
    folder = last.parent.parent
    is_recorded = (folder / "config").is_dir()
    return f"Resume with: moevlm fit --run {shlex.quote(str(folder))}" if is_recorded else ""


def _last_checkpoint(trainer: Trainer) -> Path | None:
    saving = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    kept = (Path(callback.last_model_path) for callback in saving if callback.last_model_path)
    return next((path for path in kept if path.exists()), None)
