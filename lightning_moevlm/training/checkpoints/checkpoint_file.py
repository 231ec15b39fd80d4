"""Inspects a checkpoint before anything is built from it or written; no code in it runs.

torch reads it with `weights_only`: tensors, numbers, texts and containers. A pickle that calls anything else is
refused. The tensors stay on disk until Lightning loads them, so the inspection takes milliseconds. The folder of an
exported model counts as a checkpoint of weights alone.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import lightning
import torch
from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.exported_model import is_exported, read_exported_config, read_exported_weights

HOLDS_CODE = (
    "holds more than tensors, numbers and texts, possibly code that runs when it is read; give one that `moevlm fit` "
    "has saved"
)
"""The message for a file that `weights_only` refuses."""

_SHARDED = ("meta.pt", ".metadata", "checkpoint")  # files in the folders of strategies that shard weights
_NEEDED = ("state_dict", "pytorch-lightning_version")
_NEEDED_TO_RESUME = ("loops", "optimizer_states", "lr_schedulers")


def inspect_checkpoint(path: str | None, subcommand: str, root: Path) -> Mapping[str, Any] | None:
    """Return the content of a checkpoint, its tensors mapped from the disk.

    None if it cannot be inspected yet: no path, a server's, sharded weights, or a word that Lightning resolves.

    Args:
        path: a file, `last` (of the resumed run) or `hpc` (saved on a cluster's signal).
        subcommand: fit, validate, test or predict.
        root: folder of checkpoints that are saved on a cluster's signal.

    Raises:
        UserError: the file is missing, not a whole checkpoint or would run code, or the word has no meaning here.
    """
    if not path:
        return None
    if path == "best" or (path == "last" and subcommand != "fit"):
        raise UserError(
            f"ckpt_path is {path}, but this command has no run: give a file, or --run RUN --ckpt_path {path}"
        )
    if path == "hpc" and not list(root.glob("hpc_ckpt_*.ckpt")):
        raise UserError(f"ckpt_path is hpc, but {root} has no hpc_ckpt_N.ckpt: give a .ckpt file")
    local = path.removeprefix("file://")
    return None if path in ("last", "hpc") or "://" in local else _read(Path(local), subcommand == "fit")


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Return the content of a checkpoint whose weights are wanted, its tensors mapped from the disk.

    Raises:
        UserError: the file is missing, not a whole checkpoint, or would run code.
    """
    checkpoint = _read(path, resumes=False)
    if checkpoint is None:
        raise UserError(f"the checkpoint {path} has sharded weights, which cannot be read here; give a .ckpt file")
    return checkpoint


def find_best_checkpoint(last: Path) -> Path | None:
    """Return the best checkpoint of the first `ModelCheckpoint`, in the folder of the last one; None without one.

    Raises:
        UserError: the last one cannot be read.
    """
    checkpoint = _read(last, resumes=False)
    states = checkpoint.get("callbacks", {}) if checkpoint is not None else {}
    best = next((state["best_model_path"] for state in states.values() if state.get("best_model_path")), None)
    path = last.with_name(Path(best).name) if best else None
    return path if path is not None and path.exists() else None


def refuse_other_model(checkpoint: Mapping[str, Any], path: str, module: nn.Module) -> None:
    """Refuse weights whose names or shapes differ from the model's."""
    there = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    here = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    names = [name for name in (*here, *(there.keys() - here.keys())) if there.get(name) != here.get(name)]
    if not names:
        return
    name = names[0]
    others = f", and {len(names) - 1} more tensors differ" if len(names) > 1 else ""
    config = Path(path.removeprefix("file://")).parent.parent / "config" / "config.yaml"
    advice = f"-c {config}" if config.is_file() else "the configuration of its training"
    raise UserError(
        f"the checkpoint {path} is of another model: {name} is {_shape(there, name)} in it, {_shape(here, name)} "
        f"here{others}; give {advice}"
    )


def _read(path: Path, resumes: bool) -> Mapping[str, Any] | None:
    if is_exported(path):
        if resumes:
            raise UserError(
                f"{path} is an exported model, which has no state of training to resume from: start a new run from its "
                f"weights with --model.init_from.checkpoint {path}"
            )
        return _as_checkpoint(path)
    if path.is_dir():
        if any((path / name).exists() for name in _SHARDED):
            return None
        raise UserError(
            f"the checkpoint {path} is a folder: give a .ckpt file, such as {path}/last.ckpt, or the folder of an "
            "exported model"
        )
    if not path.exists():
        last = "; or last, which resumes from the run's own checkpoint if there is one" if resumes else ""
        raise UserError(f"no checkpoint at {path}: give a .ckpt file{last}")
    if not is_zipfile(path):
        fault = "is not a checkpoint, or is truncated" if path.stat().st_size else "is empty"
        raise UserError(f"the checkpoint {path} {fault}; give one that `moevlm fit` has saved")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"the checkpoint {path} {HOLDS_CODE}") from error
    except Exception as error:  # anything, for an archive that holds something else
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the checkpoint {path} is damaged ({reason}); give another one") from error
    missing = [key for key in (*_NEEDED, *(_NEEDED_TO_RESUME if resumes else ())) if _lacks(checkpoint, key)]
    if missing:
        to_resume = " to resume training" if missing[0] in _NEEDED_TO_RESUME else ""
        raise UserError(
            f"the checkpoint {path} has no {', '.join(missing)}{to_resume}; give one that `moevlm fit` has saved"
        )
    assert isinstance(checkpoint, dict)
    return checkpoint


def _as_checkpoint(folder: Path) -> Mapping[str, Any]:
    """Return an exported model as Lightning expects a checkpoint of weights alone."""
    config = read_exported_config(folder)
    return {
        "state_dict": read_exported_weights(folder),
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": config.source.step,
    }


def _lacks(checkpoint: object, key: str) -> bool:
    return not isinstance(checkpoint, dict) or key not in checkpoint


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return "missing" if name not in shapes else f"({', '.join(map(str, shapes[name]))})"
