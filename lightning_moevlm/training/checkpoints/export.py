"""Exports a trained model, for plain PyTorch and for others: `contracts/exported_model.py` says what is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_moevlm import __version__
from lightning_moevlm.contracts.exported_model import (
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    DataFacts,
    ExportedConfig,
    SourceRun,
    write_exported,
)

TOKENIZER_FILE = "tokenizer.json"
_OWN = "lightning_moevlm."
_MODEL = ("backbone.", "objective.")


def export_model(
    module: nn.Module,
    model: Mapping[str, Any],
    data: DataFacts,
    source: SourceRun,
    tokenizer: bytes | None,
    out: Path,
    replace: bool = False,
) -> ExportedConfig:
    """Write a module's backbone and objective to a folder.

    Args:
        module: a VisionLanguageModule.
        model: the section `model` of its configuration, with every default.
        data: sizes of images and texts.
        source: the run.
        tokenizer: content of the tokenizer's file; None for a model of images alone.
        out: the folder.
        replace: whether an exported model that is there gives way.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    files: dict[str, bytes] = {} if tokenizer is None else {TOKENIZER_FILE: tokenizer}
    named: dict[str, str] = {}
    parts = {name: _describe(model[name], name, files, named) for name in ("backbone", "objective")}
    config = ExportedConfig(
        FORMAT,
        __version__,
        parts["backbone"],
        parts["objective"],
        dict(model["precision"]),
        data,
        source,
        None if tokenizer is None else TOKENIZER_FILE,
        named,
    )
    weights = {name: value for name, value in module.state_dict().items() if name.startswith(_MODEL)}
    write_exported(out, config, weights, files, replace)
    return config


def _describe(value: Any, key: str, files: dict[str, bytes], named: dict[str, str]) -> Any:
    """Return a part of a configuration with short names of our classes; collect the files that it names."""
    if isinstance(value, Mapping):
        return {name: _describe(each, f"{key}.{name}", files, named) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_describe(each, key, files, named) for each in value]
    if not isinstance(value, str):
        return value
    if key.endswith(".class_path"):
        return value.rpartition(".")[2] if value.startswith(_OWN) else value
    path = Path(value)
    if not (path.suffix and path.is_file()):
        return value
    content = path.read_bytes()
    name = path.name
    if files.get(name, content) != content or name in (CONFIG_FILE, WEIGHTS_FILE):
        name = f"{key.rpartition('.')[2]}-{len(files)}{path.suffix}"
    files[name] = content
    named[key] = name
    return name
