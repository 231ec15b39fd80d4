"""fit, validate, test, predict: LightningCLI with the faults mended that would bite an ablation.

- Configurations are merged first and interpolated last (`parser_mode="omegaconf+"`), so an overriding file or flag
  moves everything that refers to it; absolute references work although the subcommand is their root.
- Values stored in a checkpoint never beat the command line (Lightning #21455).
- The configuration is kept as artifacts of the MLflow run; Lightning's own callback fails on a logger without a
  directory (Lightning #19441).
- A mistake in a configuration is one line and exit code 2.
"""

import gc
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, set_dumper, set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

import lightning_moevlm.callbacks
import lightning_moevlm.objectives  # noqa: F401 - imported parts can be selected by their short class names
from lightning_moevlm.config_overlays import with_nulls_as_files, with_sources_merged
from lightning_moevlm.errors import UserError
from lightning_moevlm.models import ModelCard, model_card
from lightning_moevlm.notices import Notices, ReleaseNotices, calm_terminal, held_notices
from lightning_moevlm.parse_errors import told_from_the_mistake
from lightning_moevlm.refused_nulls import refuse_nulls
from lightning_moevlm.shards.datamodule import ShardDataModule
from lightning_moevlm.shipped import find_file, missing_file
from lightning_moevlm.signatures import imported_class
from lightning_moevlm.tracking import RunRecord
from lightning_moevlm.training import VisionLanguageModule, try_schedule
from lightning_moevlm.training.checkpoint_file import HOLDS_CODE, look_at_checkpoint, refuse_other_model
from lightning_moevlm.training.refusals import (
    refuse_other_groups,
    refuse_other_precision,
    refuse_other_state,
    refuse_vanishing_eps,
)

PLUGIN_GROUP = "lightning_moevlm.plugins"

_PARSER_OPTIONS: dict[str, Any] = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False}
_SECTIONS = {"trainer": Trainer, "model": VisionLanguageModule, "data": ShardDataModule}
_INCOMPLETE = "the following arguments are required"
_DEFAULTS: dict[str, object] = {
    "trainer.logger": {"class_path": "lightning_moevlm.tracking.RunLogger"},
    "trainer.callbacks": [
        {"class_path": "lightning_moevlm.callbacks.Telemetry"},
        {"class_path": "lightning_moevlm.callbacks.Liveness"},
        {"class_path": "lightning_moevlm.callbacks.DivergenceGuard"},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": "val/task_loss", "save_last": True, "save_on_train_epoch_end": False},
        },
        {"class_path": "lightning_moevlm.callbacks.StepProgress"},
        {"class_path": "lightning_moevlm.callbacks.ResultTable"},
    ],
    # the whole validation set before the first step: the untrained model is step 0 of every curve
    "trainer.num_sanity_val_steps": -1,
    "trainer.enable_model_summary": False,  # Telemetry says it in one line, with what is active
}


class CommandLine(LightningCLI):
    """LightningCLI for `VisionLanguageModule` on `ShardDataModule`; it parses `sys.argv`.

    Args:
        asked: the subcommand.
        argv: the command line as the user typed it, for the record.
        notices: released when the run begins.
    """

    def __init__(self, asked: str, argv: Sequence[str], notices: Notices) -> None:
        self._asked = asked
        super().__init__(
            VisionLanguageModule,
            ShardDataModule,
            save_config_callback=RunRecord,
            save_config_kwargs={"argv": ["moevlm", *argv]},
            seed_everything_default=0,
            parser_kwargs={**_PARSER_OPTIONS, "prog": "moevlm", self._asked: dict(_PARSER_OPTIONS)},
            auto_configure_optimizers=False,
            trainer_defaults={"callbacks": ReleaseNotices(notices)},
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Let checkpoints be read without unpickling, so that the record of a run says so."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Build the parser of the subcommand that was asked for alone: each costs a fifth of a second.

        Static in LightningCLI, which calls it on the instance all the same.
        """
        return {self._asked: LightningCLI.subcommands()[self._asked]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the Trainer our logger and callbacks unless a configuration names others."""
        parser.set_defaults(_DEFAULTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; tell a mistake with what the option allows."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            told = told_from_the_mistake(str(error), _types(self._parser(self._asked)))
            advice = "; name a configuration, e.g. -c conf/quickstart.yaml" if told.startswith(_INCOMPLETE) else ""
            raise UserError(told + advice) from error

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that is not there before anything is built or written; drop what is not wanted."""
        gc.freeze()  # what imports and parsers made stays: no collection need walk it
        gc.enable()
        config = self.config[self.subcommand]
        _refuse_nulls(config.as_dict())
        if self.subcommand == "predict":
            config.trainer.logger = False  # nothing to log, and Lightning would open an empty run
        if config.weights_only is False:
            raise UserError(
                "weights_only is false, but a checkpoint that needs it runs code when it is read: leave it out"
            )
        config.weights_only = True  # null is Lightning's default, which unpickles what comes from a server
        root = Path(config.trainer.default_root_dir or ".")
        self._checkpoint = look_at_checkpoint(config.get("ckpt_path"), self._asked, root)
        if config.trainer.fast_dev_run:
            _save_nothing(config.trainer.callbacks)
        if config.trainer.enable_progress_bar is False and isinstance(config.trainer.callbacks, list):
            config.trainer.callbacks = [
                callback for callback in config.trainer.callbacks if not callback.class_path.endswith(".StepProgress")
            ]

    def after_instantiate_classes(self) -> None:
        """Refuse, before anything is written, what only the parts as built can tell not to fit."""
        config = self.config[self.subcommand]
        refuse_other_precision(config.trainer.precision, self.trainer)
        if self._checkpoint is not None:
            refuse_other_model(self._checkpoint, config.ckpt_path, self.model)
        if self.subcommand == "fit":
            refuse_vanishing_eps(self.trainer, self.model.build_optimizer())
            try_schedule(self.model, self.trainer.max_steps)
            if self._checkpoint is not None:
                refuse_other_groups(self._checkpoint, self.model)
                refuse_other_state(self._checkpoint, self.model.optimizer_factory)
        self._checkpoint = None

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: a checkpoint restores state, it does not configure."""


def run(args: Sequence[str]) -> None:
    """Run `moevlm fit|validate|test|predict ...`; args start with the subcommand.

    Raises:
        UserError: a mistake in the configuration or in what it points to.
        KeyboardInterrupt: the user interrupted; Lightning has closed the run.
    """
    _prepare()
    with TemporaryDirectory() as folder, held_notices() as notices, _teaching_errors():
        words = with_nulls_as_files(_with_shipped_configs(args, Path(folder)), Path(folder))
        # on sys.argv and not as an argument: to start further ranks, Lightning runs this command line again
        sys.argv = [sys.argv[0], *words]
        try:
            CommandLine(args[0], args, notices)
        except SystemExit as exit_:
            if isinstance(exit_.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from exit_
            raise


def resolve_config(config_files: Sequence[Path], overrides: Mapping[str, object]) -> dict[str, object]:
    """Return the configuration that `moevlm fit -c FILE ...` would train with, every default filled in; builds nothing.

    Args:
        config_files: as given with -c, in order.
        overrides: nested mapping, merged last.

    Raises:
        UserError: a file is missing, or an option or class is unknown or of the wrong type.
    """
    return ConfigResolver()(config_files, overrides)


class ConfigResolver:
    """`resolve_config` with the parser built once, for many configurations."""

    def __init__(self) -> None:
        _prepare()
        self._parser = LightningArgumentParser(**_PARSER_OPTIONS)
        self._parser.add_argument("-c", "--config", action=ActionConfigFile)
        self._parser.add_argument("--seed_everything", type=bool | int, default=0)
        self._parser.add_lightning_class_args(Trainer, "trainer")
        self._parser.add_lightning_class_args(VisionLanguageModule, "model")
        self._parser.add_lightning_class_args(ShardDataModule, "data")
        self._parser.set_defaults(_DEFAULTS)

    def __call__(self, config_files: Sequence[Path], overrides: Mapping[str, object]) -> dict[str, object]:
        """Resolve one configuration."""
        with TemporaryDirectory() as folder, _teaching_errors(self._parser):
            last = Path(folder) / "overrides.yaml"
            last.write_text(json.dumps(dict(overrides)), encoding="utf-8")  # JSON is YAML that quotes every text
            files = with_sources_merged([*map(shipped_config, config_files), last], Path(folder))
            namespace = self._parser.parse_args([flag for path in files for flag in ("-c", str(path))])
            namespace.pop("config", None)
            resolved: dict[str, object] = yaml.safe_load(self._parser.dump(namespace, skip_unset=False))
            _refuse_nulls(resolved)
        return resolved


def describe_model(resolved: Mapping[str, object]) -> ModelCard:
    """Return what the model of a resolved configuration costs; built whole, but without memory for its weights.

    Raises:
        UserError: options out of range, or parts that do not fit each other: whatever `moevlm fit` would refuse when it
            builds the model, its optimiser and its schedule.
    """
    return ModelDescriber()(resolved)


class ModelDescriber:
    """`describe_model` with each model built once, however many configurations have it."""

    def __init__(self) -> None:
        _prepare()
        self._cards: dict[str, ModelCard] = {}

    def __call__(self, resolved: Mapping[str, object]) -> ModelCard:
        """Describe one configuration's model."""
        model = repr(resolved["model"])
        if model not in self._cards:
            parser = _model_parser()
            with _teaching_errors(), torch.device("meta"):
                module = parser.instantiate(parser.parse_object({"model": resolved["model"]})).model
                try_schedule(module)
                self._cards[model] = model_card(module.backbone)
        return self._cards[model]


@cache
def _model_parser() -> LightningArgumentParser:
    """Return the parser of the model section alone; a plan asks it for every arm."""
    parser = LightningArgumentParser(**_PARSER_OPTIONS)
    parser.add_lightning_class_args(VisionLanguageModule, "model")
    return parser


def build_data(resolved: Mapping[str, object]) -> ShardDataModule:
    """Return the data module of a resolved configuration; nothing is opened.

    Raises:
        UserError: an option out of range.
    """
    _prepare()
    parser = LightningArgumentParser(**_PARSER_OPTIONS)
    parser.add_lightning_class_args(ShardDataModule, "data")
    with _teaching_errors():
        built = parser.instantiate(parser.parse_object({"data": dict(resolved)})).data
    assert isinstance(built, ShardDataModule)
    return built


def shipped_config(path: Path) -> Path:
    """Return the file itself, or, where there is none, the one of that name that the package ships.

    Raises:
        UserError: neither exists; names the nearest one.
    """
    found = find_file(path)
    if found is None:
        raise missing_file("configuration file", path)
    return found


def load_plugins() -> None:
    """Import what other packages offer under the entry-point group, so that their parts have short names here."""
    for entry in entry_points(group=PLUGIN_GROUP):
        entry.load()


def _prepare() -> None:
    load_plugins()
    # naming any denied path makes jsonargparse enforce its own list (os, subprocess, ...) instead of warning
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True, import_path_denylist=["os", "subprocess"])
    set_dumper("omegaconf+", _dump_yaml)
    calm_terminal()


class _Dumper(yaml.SafeDumper):
    """Quotes texts such as 632471343e91, which the parser that reads them back takes for numbers."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+"), list("-+0123456789.")
)


def _dump_yaml(data: object) -> str:
    """Write YAML for jsonargparse, which dumps a merged configuration and reads it back."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _with_shipped_configs(args: Sequence[str], folder: Path) -> list[str]:
    words: list[str] = []
    files: list[Path] = []
    for before, word in zip(("", *args), args, strict=False):
        flag, equals, value = word.partition("=")
        if before in ("-c", "--config"):
            word = value = str(shipped_config(Path(word)))
        elif flag == "--config" and equals:
            value = str(shipped_config(Path(value)))
            word = f"--config={value}"
        else:
            words.append(word)
            continue
        words.append(word)
        merged = with_sources_merged([*files, Path(value)], folder)
        if merged[-1] != Path(value):
            words += ["-c", str(merged[-1])]
        files.append(Path(value))
    return words


def _refuse_nulls(resolved: Mapping[str, Any]) -> None:
    for section, part in _SECTIONS.items():
        refuse_nulls(section, part, resolved[section])


def _save_nothing(callbacks: object) -> None:
    """Let a fast_dev_run leave nothing: Lightning saves `save_last` all the same when training ends."""
    for callback in callbacks if isinstance(callbacks, list) else []:
        part = imported_class(callback.class_path)
        if part is not None and issubclass(part, ModelCheckpoint):
            callback.init_args.save_last = None


def _types(parser: LightningArgumentParser) -> dict[str, object]:
    """Return the annotation of every option by its whole key."""
    actions = [action for action in parser._actions if action.dest and not action.dest.endswith(".help")]
    return {action.dest: getattr(action, "_typehint", None) or action.type for action in actions}


@contextmanager
def _teaching_errors(parser: LightningArgumentParser | None = None) -> Iterator[None]:
    """Turn what parsers and Lightning raise for a user's mistake into one line."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(told_from_the_mistake(str(error), _types(parser) if parser else None)) from error
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {_one_line(str(error))}") from error
    except yaml.YAMLError as error:
        raise UserError(f"a configuration file is no YAML: {_one_line(str(error))}") from error
    except UnpicklingError as error:  # of a server's checkpoint; others were looked at before
        raise UserError(f"the checkpoint {HOLDS_CODE}") from error
    except MisconfigurationException as error:
        raise UserError(_one_line(str(error))) from error
    except ModuleNotFoundError as error:
        if str(error.name).startswith(__package__):
            raise
        raise UserError(
            f"{_one_line(str(error))}; install the package that the option needs, or choose another"
        ) from error
    except ValueError as error:
        mistake = _mistake_below(error)
        if mistake is None or mistake is error:
            raise
        raise UserError(str(mistake)) from error


def _mistake_below(error: BaseException) -> UserError | None:
    """Return what a part of a nullable option refused, out of the parser's account of every type that it tried."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause


def _one_line(message: str) -> str:
    return " ".join(message.split())
