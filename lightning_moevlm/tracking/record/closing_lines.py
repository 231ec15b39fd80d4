"""What a run says when it ends: where everything is, and how to resume or measure it."""

import shlex
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moevlm.tracking.links import run_link, server_command, ui_address
from lightning_moevlm.tracking.read.run_selection import SHOWN_DIGITS
from lightning_moevlm.tracking.store import resolve_tracking_uri
from lightning_moevlm.tracking.write.run_logger import RunLogger


def closing_lines(uri: str, experiment_id: str, run_id: str, run_dir: Path) -> tuple[str, ...]:
    """Return the lines to print after a run; the second is missing where the store is a server, which runs already."""
    server = server_command(uri)
    word = run_argument(uri, run_id, run_dir)
    return (
        f"Checkpoints and configuration: {run_dir}",
        *(() if server is None else (f"MLflow: {server}",)),
        f"{'MLflow:' if server is None else '       '} {run_link(ui_address(uri), experiment_id, run_id)}",
        f"Measure or resume: moevlm test --run {word}, moevlm fit --run {word}",
    )


def run_argument(uri: str, run_id: str, run_dir: Path) -> str:
    """Return what `--run` finds a run by, in the shell's words.

    That is how its id begins, or, in a store that only its configuration names, its folder.
    """
    return run_id[:SHOWN_DIGITS] if uri == resolve_tracking_uri(None) else shlex.quote(str(run_dir))


def checkpoint_lines(trainer: Trainer) -> tuple[str, ...]:
    """Return the lines to print after a run that MLflow does not hold."""
    last = _last_checkpoint(trainer)
    if last is None:
        return ()
    folder = last.parent.parent
    if not (folder / "config").is_dir():
        return (f"Checkpoints: {last.parent}",)
    word = shlex.quote(str(folder))
    return (
        f"Checkpoints and configuration: {folder}",
        f"Measure or resume: moevlm test --run {word}, moevlm fit --run {word}",
    )


def resume_line(trainer: Trainer) -> str:
    """Return how to resume a run that ended early, or "" where it has kept no checkpoint or no configuration."""
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
