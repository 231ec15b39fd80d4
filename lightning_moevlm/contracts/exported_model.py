"""The files of an exported model: its weights as safetensors, and `config.json`, which says what they are weights of.

A folder holds all that inference needs: the two files, the tokenizer, and files that parts of the model read (a
codebook, a list of answers). They are data: nothing in them is unpickled, imported or run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_moevlm import __version__
from lightning_moevlm.common.atomic_files import write_folder
from lightning_moevlm.common.errors import UserError

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
FORMAT = "moevlm-export/1"
_KIND = "moevlm-export/"
_REMEDY = "write it again with `moevlm export CHECKPOINT --out DIR`"


class DataFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the data of inference must look like."""

    image_size: int  # pixels per side, RGB, uint8; the model scales them
    max_text_len: int  # token ids per text, [BOS] and [EOS] included
    vocab_size: int  # token ids that the model embeds


class SourceRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the weights come from."""

    checkpoint: str  # name of its file
    step: int  # optimiser steps
    run: str | None = None  # MLflow id, or the name of the run's folder
    manifest: str | None = None  # digest of the training data


class ExportedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `config.json`."""

    format: str
    package_version: str  # of lightning-moevlm
    backbone: dict[str, Any]  # {class_path, init_args}, our own classes by their short names
    objective: dict[str, Any]
    precision: dict[str, Any]  # dtypes by region
    data: DataFacts
    source: SourceRun
    tokenizer: str | None = None  # name of its file in the folder
    files: dict[str, str] = {}  # names in the folder of files that options name, by key of the option


class _Version(msgspec.Struct):
    format: str = ""
    package_version: str = ""


def is_exported(folder: Path) -> bool:
    """Return whether a path is the folder of an exported model, whole or not."""
    return (folder / CONFIG_FILE).is_file() or (folder / WEIGHTS_FILE).is_file()


def read_exported_config(folder: Path) -> ExportedConfig:
    """Read `config.json`.

    Raises:
        UserError: it is missing, not JSON, of a newer version, or lacks a field.
    """
    path = folder / CONFIG_FILE
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Version)
        if version.format.startswith(_KIND) and version.format != FORMAT:
            raise UserError(
                f"{path} is of format {version.format}, written by lightning-moevlm {version.package_version}; "
                f"lightning-moevlm {__version__} reads {FORMAT}. Install a newer version, or export with this one"
            )
        if version.format != FORMAT:
            raise UserError(f"{path} is not of an exported model: format is {version.format!r}; {_REMEDY}")
        config = msgspec.json.decode(data, type=ExportedConfig)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the folder of `moevlm export`") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not the configuration of an exported model ({error}); {_REMEDY}") from None
    for name in (*config.files.values(), *([] if config.tokenizer is None else [config.tokenizer])):
        if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", ":", "\0")):
            raise UserError(f"{path} names the file {name!r}: only files in its own folder are allowed; {_REMEDY}")
    return config


def read_exported_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights by their names, such as `backbone.norm.weight`.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: copy the whole folder of `moevlm export`")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy it again, or {_REMEDY}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); let this user read it") from None


def refuse_other_weights(folder: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse weights whose names or shapes are not those of the model that `config.json` describes."""
    there = {name: tuple(value.shape) for name, value in weights.items()}
    here = {name: tuple(value.shape) for name, value in expected.items()}
    names = [name for name in (*here, *(there.keys() - here.keys())) if there.get(name) != here.get(name)]
    if names:
        name = names[0]
        others = f", and {len(names) - 1} more tensors differ" if len(names) > 1 else ""
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not belong to {CONFIG_FILE} beside it: {name} is "
            f"{there.get(name, 'missing')} in it, and {here.get(name, 'missing')} by {CONFIG_FILE}{others}; copy both "
            "files of one export"
        )


def refuse_occupied(folder: Path, replace: bool) -> None:
    """Refuse a target that holds something.

    Raises:
        UserError: it is not an exported model, or one that may not be replaced.
    """
    if not folder.exists():
        return
    if not (folder.is_dir() and (is_exported(folder) or not any(folder.iterdir()))):
        raise UserError(f"{folder} exists and is not an exported model: give --out another folder")
    if is_exported(folder) and not replace:
        raise UserError(f"{folder} holds an exported model: give --out another folder, or --force true to replace it")


def write_exported(
    folder: Path, config: ExportedConfig, weights: Mapping[str, Tensor], files: Mapping[str, bytes], replace: bool
) -> None:
    """Write a folder, whole or not at all.

    Args:
        folder: new, or an exported model if `replace`.
        config: written as `config.json`.
        weights: by name.
        files: content of the other files by name.
        replace: whether an exported model that is there gives way.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    refuse_occupied(folder, replace)
    with write_folder(folder) as unfinished:
        save_file({name: value.clone().contiguous() for name, value in weights.items()}, unfinished / WEIGHTS_FILE)
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        text = json.dumps(msgspec.to_builtins(config), indent=1, ensure_ascii=False)
        (unfinished / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        # safetensors writes for this user alone; an export is for others too
        (unfinished / WEIGHTS_FILE).chmod((unfinished / CONFIG_FILE).stat().st_mode)
