"""Loads an exported model as plain PyTorch: no Lightning, no trainer, no run.

A file may name parts, and must not choose code: classes are known by their short names, or belong to a package that the
program has imported before.
"""

import re
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.exported_model import (
    CONFIG_FILE,
    ExportedConfig,
    read_exported_config,
    read_exported_weights,
    refuse_other_weights,
)
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.backbones.features import pool_features
from lightning_moevlm.model.initial_weights import defer_initialisation
from lightning_moevlm.model.objectives import Objective
from lightning_moevlm.model.precision import PrecisionPolicy, set_precision

_DOTTED = re.compile(r"\S*\.\S*")
_PARTS = ("backbone", "objective", "precision")


class ExportedModel(nn.Module):
    """A trained backbone and its objective, with its heads.

    config: of the export; `config.data` says what images and texts look like.
    """

    def __init__(self, backbone: Backbone, objective: Objective, config: ExportedConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = objective
        self.config = config

    def forward(
        self, images_BRYX: Tensor | None = None, text_BL: Tensor | None = None, text_mask_BL: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return features averaged over real positions, (B, D) each, as `moevlm predict` does.

        Args:
            images_BRYX: uint8.
            text_BL: int64 token ids.
            text_mask_BL: True on real tokens.

        Returns:
            `image`, `text`, and with both `pair`, of image and text that see each other.
        """
        given = images_BRYX if images_BRYX is not None else text_BL
        keys = tuple(str(index) for index in range(0 if given is None else len(given)))
        return pool_features(self.backbone, Batch(images_BRYX, text_BL, text_mask_BL, keys))


def load_exported(folder: Path | str) -> ExportedModel:
    """Return an exported model on the CPU, in evaluation mode.

    Raises:
        UserError: a file is missing, damaged or of a newer version, names a part that is not known here, or the files
            do not belong together.
    """
    folder = Path(folder)
    config = read_exported_config(folder)
    weights = read_exported_weights(folder)
    parts = {name: deepcopy(getattr(config, name)) for name in _PARTS}
    for key, text in _texts(parts):
        if key not in config.files and _DOTTED.fullmatch(text) and not _is_imported_class(text):
            raise UserError(
                f"{folder / CONFIG_FILE}: {key} is {text}, which is not a known part; if you trust the file and its "
                f"part, import {text.rpartition('.')[0]} first"
            )
    for key, name in config.files.items():
        _set_file(parts, key, folder / name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=Backbone)
    parser.add_argument("--objective", type=Callable[[BackboneSpec], Objective])
    parser.add_argument("--precision", type=PrecisionPolicy)
    try:
        with defer_initialisation():
            built = parser.instantiate(parser.parse_object(parts))
            model = ExportedModel(built.backbone, built.objective(built.backbone.spec), config)
    except ArgumentError as error:
        raise UserError(
            f"{folder / CONFIG_FILE} does not describe a model of this version ({' '.join(str(error).split())}); "
            f"lightning-moevlm {config.package_version} has written it"
        ) from None
    set_precision(model, built.precision)
    refuse_other_weights(folder, weights, model.state_dict())
    model.load_state_dict(weights)
    return model.eval()


def _set_file(parts: dict[str, Any], key: str, file: Path) -> None:
    """Set an option to the whole path of its file."""
    options: Any = parts
    *path, name = key.split(".")
    for step in path:
        options = options.get(step) if isinstance(options, dict) else None
    if not isinstance(options, dict) or name not in options or name == "class_path":
        raise UserError(
            f"{file.parent / CONFIG_FILE} names a file for {key}, which is no option; export the model again"
        )
    options[name] = str(file.absolute())


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Return every text in a configuration, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _texts(each, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, key)


def _is_imported_class(path: str) -> bool:
    module, _, name = path.rpartition(".")
    return isinstance(getattr(sys.modules.get(module), name, None), type)
