"""A checkpoint is looked at before anything is built from it or written because of it; nothing in it is run.

torch reads it with `weights_only`: tensors, numbers, texts and containers, while a pickle that would call anything is
refused. The tensors stay on the disk until Lightning loads them, so the look costs milliseconds.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import nn

from lightning_moevlm.common.errors import UserError

HOLDS_CODE = (
    "holds more than tensors, numbers and texts, which may be code that runs when it is read; give one that `moevlm "
    "fit` has saved"
)
"""What is said of a file that `weights_only` refuses."""

_SHARDED = ("meta.pt", ".metadata", "checkpoint")  # what strategies that shard weights leave in their folders
_NEEDED = ("state_dict", "pytorch-lightning_version")
_NEEDED_TO_GO_ON = ("loops", "optimizer_states", "lr_schedulers")


def inspect_checkpoint(path: str | None, subcommand: str, root: Path) -> Mapping[str, Any] | None:
    """Return what a checkpoint holds, its tensors mapped from the disk.

    None where there is nothing to see yet: no path, a server's, sharded weights, or a word that Lightning resolves.

    Args:
        path: a file, `last` (of the run that goes on) or `hpc` (what a cluster's signal saved).
        subcommand: fit, validate, test or predict.
        root: where a cluster's signal saves.

    Raises:
        UserError: there is none, it is no whole checkpoint, it would run code, or the word could mean nothing here.
    """
    if not path:
        return None
    if path == "best" or (path == "last" and subcommand != "fit"):
        raise UserError(
            f"ckpt_path is {path}, and this command has trained nothing: give the file, or the run, --run RUN "
            f"--ckpt_path {path}"
        )
    if path == "hpc" and not list(root.glob("hpc_ckpt_*.ckpt")):
        raise UserError(f"ckpt_path is hpc, and no hpc_ckpt_N.ckpt is in {root}: give a .ckpt file")
    local = path.removeprefix("file://")
    return None if path in ("last", "hpc") or "://" in local else _read(Path(local), subcommand == "fit")


def find_best_checkpoint(last: Path) -> Path | None:
    """Return the checkpoint in the folder of a run's last one that the first `ModelCheckpoint` calls its best, or None.

    Raises:
        UserError: the last one cannot be read.
    """
    checkpoint = _read(last, goes_on=False)
    states = checkpoint.get("callbacks", {}) if checkpoint is not None else {}
    best = next((state["best_model_path"] for state in states.values() if state.get("best_model_path")), None)
    path = last.with_name(Path(best).name) if best else None
    return path if path is not None and path.exists() else None


def refuse_other_model(checkpoint: Mapping[str, Any], path: str, module: nn.Module) -> None:
    """Refuse weights that are not those of this model, by name and shape.

    Raises:
        UserError: with the first tensor that differs, and how many do.
    """
    there = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    here = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    names = [name for name in (*here, *(there.keys() - here.keys())) if there.get(name) != here.get(name)]
    if not names:
        return
    name = names[0]
    others = f", and {len(names) - 1} more tensors differ" if len(names) > 1 else ""
    config = Path(path.removeprefix("file://")).parent.parent / "config" / "config.yaml"
    advice = f"-c {config}" if config.is_file() else "the configuration that it was trained with"
    raise UserError(
        f"the checkpoint {path} is of another model: {name} is {_shape(there, name)} there and {_shape(here, name)} "
        f"here{others}; give {advice}"
    )


def _read(path: Path, goes_on: bool) -> Mapping[str, Any] | None:
    if path.is_dir():
        if any((path / name).exists() for name in _SHARDED):
            return None
        raise UserError(f"the checkpoint {path} is a folder: give a .ckpt file, such as {path}/last.ckpt")
    if not path.exists():
        last = "; or last, which resumes from the run's own checkpoint if there is one" if goes_on else ""
        raise UserError(f"no checkpoint at {path}: give a .ckpt file{last}")
    if not is_zipfile(path):
        what = "is not a checkpoint, or is truncated" if path.stat().st_size else "is empty"
        raise UserError(f"the checkpoint {path} {what}; give one that `moevlm fit` has saved")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"the checkpoint {path} {HOLDS_CODE}") from error
    except Exception as error:  # anything, for an archive that holds something else
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the checkpoint {path} is damaged ({reason}); give another one") from error
    missing = [key for key in (*_NEEDED, *(_NEEDED_TO_GO_ON if goes_on else ())) if _lacks(checkpoint, key)]
    if missing:
        to_go_on = " to resume training" if missing[0] in _NEEDED_TO_GO_ON else ""
        raise UserError(
            f"the checkpoint {path} has no {', '.join(missing)}{to_go_on}; give a whole one that `moevlm fit` has saved"
        )
    assert isinstance(checkpoint, dict)
    return checkpoint


def _lacks(checkpoint: object, key: str) -> bool:
    return not isinstance(checkpoint, dict) or key not in checkpoint


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return "not" if name not in shapes else f"({', '.join(map(str, shapes[name]))})"
