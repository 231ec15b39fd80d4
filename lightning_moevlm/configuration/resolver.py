"""Resolves whole configurations, and builds their models and data modules."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from jsonargparse import ActionConfigFile
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.shipped_files import find_config
from lightning_moevlm.common.yaml_text import read_yaml
from lightning_moevlm.configuration.overlays import NamesMerger
from lightning_moevlm.configuration.parsers import (
    DEFAULTS,
    PARSER_OPTIONS,
    SECTIONS,
    prepare_parsers,
    refuse_unbuildable_parts,
    user_errors,
)
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.model.backbones import ModelCard, model_card
from lightning_moevlm.training import VisionLanguageModule, try_schedule
from lightning_moevlm.training.checkpoints.checkpoint_file import inspect_checkpoint, refuse_other_model
from lightning_moevlm.training.checks.trainer_checks import refuse_other_sizes

_SIZES = ("image_size", "vocab_size", "max_text_len")
"""Options of the data that the model has to fit."""


class ConfigResolver:
    """Resolves the configuration of `moevlm fit -c FILE ...`, with every default; builds nothing."""

    def __init__(self) -> None:
        prepare_parsers()
        self._parser = LightningArgumentParser(**PARSER_OPTIONS)
        self._parser.add_argument("-c", "--config", action=ActionConfigFile)
        self._parser.add_argument("--seed_everything", type=int, default=0)
        self._parser.add_lightning_class_args(Trainer, "trainer")
        self._parser.add_lightning_class_args(VisionLanguageModule, "model")
        self._parser.add_lightning_class_args(ShardDataModule, "data")
        self._parser.set_defaults(DEFAULTS)

    def __call__(self, config_files: Sequence[Path], overrides: Mapping[str, object]) -> dict[str, object]:
        """Resolve one configuration.

        Args:
            config_files: as given with -c, in order.
            overrides: nested mapping, merged last.

        Raises:
            UserError: a file is missing, or an option or class is unknown or of the wrong type.
        """
        with TemporaryDirectory() as folder, user_errors(self._parser):
            last = Path(folder) / "overrides.yaml"
            last.write_text(json.dumps(dict(overrides)), encoding="utf-8")  # JSON is YAML that quotes every text
            merger = NamesMerger(Path(folder))
            named = [*map(find_config, config_files), last]
            files = [each for file in named for each in merger.add_file(file)]
            namespace = self._parser.parse_args([flag for path in files for flag in ("-c", str(path))])
            namespace.pop("config", None)
            dumped = self._parser.dump(namespace, skip_unset=False, skip_validation=True)  # valid: it was just parsed
            resolved: dict[str, object] = read_yaml(dumped)
            refuse_unbuildable_parts(resolved)
        return resolved


def describe_model(resolved: Mapping[str, object]) -> ModelCard:
    """Return the costs of a resolved configuration's model, which is built without memory for its weights.

    Raises:
        UserError: options out of range, or parts that do not fit each other, as `moevlm fit` refuses them when it
            builds the model, its optimiser and its schedule.
    """
    return _common_describer()(resolved)


class ModelDescriber:
    """`describe_model` that builds equal models once.

    Args:
        complete: whether the configurations hold every default, as `ConfigResolver` returns them; looking defaults up
            takes most of the time.
    """

    def __init__(self, complete: bool = False) -> None:
        self._complete = complete
        self._cards: dict[str, ModelCard] = {}

    def __call__(self, resolved: Mapping[str, object]) -> ModelCard:
        """Describe one configuration's model."""
        data = resolved.get("data")
        sizes = [data.get(name) for name in _SIZES] if isinstance(data, Mapping) else None
        model = repr((resolved["model"], sizes))
        if model not in self._cards:
            self._cards[model] = model_card(build_without_memory(resolved, self._complete).backbone)
        return self._cards[model]


@cache
def _common_describer() -> ModelDescriber:
    return ModelDescriber()


def build_without_memory(resolved: Mapping[str, object], complete: bool = False) -> VisionLanguageModule:
    """Return the module of a resolved configuration, its weights on "meta"; errors are those of `describe_model`.

    Args:
        resolved: the configuration.
        complete: whether it holds every default.
    """
    prepare_parsers()
    parser = _model_parser()
    with user_errors(), torch.device("meta"):
        # a copy: the parser replaces values in mappings of names by the parts that it builds
        parsed = parser.parse_object({"model": deepcopy(resolved["model"])}, defaults=not complete)
        module = parser.instantiate(parsed).model
        assert isinstance(module, VisionLanguageModule)
        data = resolved.get("data")
        if isinstance(data, Mapping):
            refuse_other_sizes(module.backbone.spec, data)
        try_schedule(module)
    return module


@cache
def _model_parser() -> LightningArgumentParser:
    """Return the parser of the model section alone, which a plan uses for every arm."""
    parser = LightningArgumentParser(**PARSER_OPTIONS)
    parser.add_lightning_class_args(VisionLanguageModule, "model")
    return parser


class LoadedRun(NamedTuple):
    """A run's model, and what it was loaded from."""

    module: VisionLanguageModule  # with the weights of the checkpoint, in evaluation mode
    resolved: Mapping[str, Any]  # the run's configuration with every default
    checkpoint: Mapping[str, Any]


def load_module(checkpoint: Path | str, config: Path | str | None = None) -> VisionLanguageModule:
    """Return the model of a run with the weights of a checkpoint, in evaluation mode.

    Args:
        checkpoint: such as RUN/checkpoints/last.ckpt.
        config: the configuration of its training; None is RUN/config/config.yaml, which every run writes.

    Raises:
        UserError: one of them is missing, or they do not belong together.
    """
    return load_run(checkpoint, config).module


def load_run(checkpoint: Path | str, config: Path | str | None = None) -> LoadedRun:
    """Return what `load_module` returns, with the configuration and the checkpoint that it was loaded from."""
    path = Path(checkpoint)
    if not path.is_file():
        raise UserError(f"{path} is no file: give a checkpoint of a run, such as RUN/checkpoints/last.ckpt")
    file = path.parent.parent / "config" / "config.yaml" if config is None else Path(config)
    if not file.is_file():
        raise UserError(
            f"{path} has no configuration at {file}: pass that of its training, config=FILE (--config FILE)"
        )
    saved = inspect_checkpoint(str(path), "test", Path())
    if saved is None:
        raise UserError(f"{path} is not a checkpoint in one local file: give one such as RUN/checkpoints/last.ckpt")
    recorded = read_yaml(file.read_text(encoding="utf-8"))
    sections = {name: recorded[name] for name in (*SECTIONS, "seed_everything") if name in recorded}
    resolved = ConfigResolver()([], sections)
    parser = _model_parser()
    with user_errors():
        module = parser.instantiate(parser.parse_object({"model": deepcopy(resolved["model"])})).model
    assert isinstance(module, VisionLanguageModule)
    refuse_other_model(saved, str(path), module)
    module.load_state_dict(saved["state_dict"])
    return LoadedRun(module.eval(), resolved, saved)


def build_data(resolved: Mapping[str, object]) -> ShardDataModule:
    """Return the data module of a resolved configuration; nothing is opened.

    Raises:
        UserError: an option out of range.
    """
    prepare_parsers()
    parser = LightningArgumentParser(**PARSER_OPTIONS)
    parser.add_lightning_class_args(ShardDataModule, "data")
    with user_errors():
        built = parser.instantiate(parser.parse_object({"data": deepcopy(dict(resolved))})).data
    assert isinstance(built, ShardDataModule)
    return built
