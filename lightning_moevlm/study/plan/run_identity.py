"""Computes the digest that identifies a run.

It covers the resolved config, all defaults filled in, without cosmetic keys. A resolved config has every key, so one
that is null can be left out: an option that is added later and off does not make another experiment. Nor does moving a
file, because a class of this package is spelled by its short name.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_moevlm.common.digest import digest_text
from lightning_moevlm.common.flat_config import flatten as spelled


class Cosmetic(NamedTuple):
    """A key that does not change the training of a run."""

    name: str  # dotted prefix; for callbacks the end of a class path
    reason: str


_SEEDS = ("seed", "seed_everything")  # the last part of the keys that hold one

COSMETIC_KEYS: tuple[Cosmetic, ...] = (
    Cosmetic("config", "names of config files; their values are resolved already"),
    Cosmetic("trainer.logger", "place of results"),
    Cosmetic("trainer.default_root_dir", "place of files"),
    Cosmetic("trainer.enable_progress_bar", "terminal output"),
    Cosmetic("trainer.enable_model_summary", "terminal output"),
    Cosmetic("data.cache_dir", "place of downloads"),
    Cosmetic("data.cache_gib", "size of the download cache"),
    Cosmetic("data.allowed_protocols", "limits access only"),
)

COSMETIC_CALLBACKS: tuple[Cosmetic, ...] = (
    Cosmetic("ProgressBar", "terminal output"),
    Cosmetic("StepProgress", "terminal output"),
    Cosmetic("ResultTable", "terminal output"),
    Cosmetic("ModelSummary", "terminal output"),
)


def compute_digest(resolved: Mapping[str, Any]) -> str:
    """Return the first 12 hex digits of the SHA-256 of the config's JSON, without cosmetic keys and nulls."""
    text = json.dumps(
        _drop_nulls(drop_cosmetic_keys(resolved)), sort_keys=True, separators=(",", ":"), default=_path_as_text
    )
    return digest_text(text)


def drop_cosmetic_keys(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the config without cosmetic keys, classes of this package by their short names."""
    rest = copy.deepcopy(dict(resolved))
    for cosmetic in COSMETIC_KEYS:
        _remove(rest, cosmetic.name.split("."))
    trainer = rest.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("callbacks"), list):
        trainer["callbacks"] = [c for c in trainer["callbacks"] if not _is_cosmetic_callback(c)]
    shortened: dict[str, Any] = _shorten_class_paths(rest)
    return shortened


def flatten_without_seeds(resolved: Mapping[str, Any]) -> dict[str, str]:
    """Return the config's leaves as text by dotted key, sorted, without seeds and cosmetic keys."""
    leaves = spelled(drop_cosmetic_keys(resolved))
    return {key: leaves[key] for key in sorted(leaves) if key.split(".")[-1] not in _SEEDS}


def _remove(config: Any, path: list[str]) -> None:
    for part in path[:-1]:
        config = config.get(part) if isinstance(config, dict) else None
    if isinstance(config, dict):
        config.pop(path[-1], None)


def _is_cosmetic_callback(callback: Any) -> bool:
    class_path = callback.get("class_path", "") if isinstance(callback, dict) else ""
    return any(str(class_path).endswith(cosmetic.name) for cosmetic in COSMETIC_CALLBACKS)


def _path_as_text(value: Any) -> str:
    assert isinstance(value, Path), f"a resolved config holds plain data, got {type(value).__name__}"
    return str(value)


_OURS = f"{__name__.partition('.')[0]}."  # how the paths of this package's classes begin


def _shorten_class_paths(value: Any) -> Any:
    """Spell classes of this package by their short names: moving a file does not make another experiment."""
    if isinstance(value, dict):
        return {
            key: _short_name(item) if key == "class_path" else _shorten_class_paths(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_shorten_class_paths(item) for item in value]
    return value


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_drop_nulls(item) for item in value]
    return value


def _short_name(class_path: Any) -> Any:
    is_ours = isinstance(class_path, str) and class_path.startswith(_OURS)
    return class_path.rpartition(".")[2] if is_ours else class_path
