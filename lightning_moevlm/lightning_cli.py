"""fit, validate, test, predict: LightningCLI with the faults mended that would bite an ablation.

- Configurations are merged first and interpolated last (`parser_mode="omegaconf+"`), so an overriding file or flag
  moves everything that refers to it; absolute references work although the subcommand is their root.
- Values stored in a checkpoint never beat the command line (Lightning #21455).
- The configuration is kept as artifacts of the MLflow run; Lightning's own callback fails on a logger without a
  directory (Lightning #19441).
- A mistake in a configuration is one line and exit code 2.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

import lightning_moevlm.callbacks
import lightning_moevlm.objectives  # noqa: F401 - imported parts can be selected by their short class names
from lightning_moevlm.errors import UserError
from lightning_moevlm.models import ModelCard, model_card
from lightning_moevlm.shards.datamodule import ShardDataModule
from lightning_moevlm.tracking import RunRecord
from lightning_moevlm.training import VisionLanguageModule

PLUGIN_GROUP = "lightning_moevlm.plugins"

_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")  # Lightning's own
_PARSER_OPTIONS: dict[str, Any] = {"parser_mode": "omegaconf+", "exit_on_error": False}
_NOISE = ("💡", "litlogger", "TPU available", "was configured so")
_DEFAULTS: dict[str, object] = {
    "trainer.logger": {"class_path": "lightning_moevlm.tracking.RunLogger"},
    "trainer.callbacks": [
        {"class_path": "lightning_moevlm.callbacks.Telemetry"},
        {"class_path": "lightning_moevlm.callbacks.DivergenceGuard"},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": "val/task_loss", "save_last": True, "save_on_train_epoch_end": False},
        },
        {"class_path": "lightning_moevlm.callbacks.StepProgress"},
    ],
    # the whole validation set before the first step: the untrained model is step 0 of every curve
    "trainer.num_sanity_val_steps": -1,
    "trainer.enable_model_summary": False,  # Telemetry says it in one line, with what is active
}


class CommandLine(LightningCLI):
    """LightningCLI for `VisionLanguageModule` on `ShardDataModule`."""

    def __init__(self, args: Sequence[str]) -> None:
        self._asked = args[0]
        super().__init__(
            VisionLanguageModule,
            ShardDataModule,
            save_config_callback=RunRecord,
            save_config_kwargs={"argv": ["moevlm", *args]},
            seed_everything_default=0,
            parser_kwargs={**_PARSER_OPTIONS, "prog": "moevlm", self._asked: dict(_PARSER_OPTIONS)},
            auto_configure_optimizers=False,
            args=list(args),
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Build the parser of the subcommand that was asked for alone: each costs a fifth of a second.

        Static in LightningCLI, which calls it on the instance all the same.
        """
        return {self._asked: LightningCLI.subcommands()[self._asked]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the Trainer our logger and callbacks unless a configuration names others."""
        parser.set_defaults(_DEFAULTS)

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that is not there before anything is built or written."""
        path = self.config[self.subcommand].get("ckpt_path")
        if path and path not in _CHECKPOINT_WORDS and "://" not in path and not Path(path).exists():
            raise UserError(f"no checkpoint at {path}: give a .ckpt file, or one of {', '.join(_CHECKPOINT_WORDS)}")

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: a checkpoint restores state, it does not configure."""


def run(args: Sequence[str]) -> None:
    """Run `moevlm fit|validate|test|predict ...`; args start with the subcommand.

    Raises:
        UserError: a mistake in the configuration or in what it points to.
    """
    _prepare()
    with _teaching_errors(), _alone_on_the_command_line():
        CommandLine(_with_shipped_configs(args))


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
        with TemporaryDirectory() as folder, _teaching_errors():
            last = Path(folder) / "overrides.yaml"
            last.write_text(yaml.safe_dump(dict(overrides)), encoding="utf-8")
            files = [shipped_config(path) for path in config_files]
            namespace = self._parser.parse_args([flag for path in (*files, last) for flag in ("-c", str(path))])
            namespace.pop("config", None)
            resolved = yaml.safe_load(self._parser.dump(namespace, skip_unset=False))
        return dict(resolved)


def describe_model(resolved: Mapping[str, object]) -> ModelCard:
    """Return what the model of a resolved configuration costs, without allocating its weights.

    Raises:
        UserError: dimensions that do not fit each other.
    """
    _prepare()
    parser = LightningArgumentParser(**_PARSER_OPTIONS)
    parser.add_lightning_class_args(VisionLanguageModule, "model")
    with _teaching_errors(), torch.device("meta"):
        namespace = parser.parse_object({"model": resolved["model"]})
        return model_card(parser.instantiate(namespace).model.backbone)


def shipped_config(path: Path) -> Path:
    """Return the file itself, or, where there is none, the one of that name that the package ships.

    Raises:
        UserError: neither exists.
    """
    if path.is_file():
        return path
    shipped = Path(__file__).parent / path
    if not path.is_absolute() and shipped.is_file():
        return shipped
    raise UserError(f"no configuration file {path}: the shipped ones are in conf/, e.g. conf/quickstart.yaml")


def load_plugins() -> None:
    """Import what other packages offer under the entry-point group, so that their parts have short names here."""
    for entry in entry_points(group=PLUGIN_GROUP):
        entry.load()


def _prepare() -> None:
    load_plugins()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    _calm_terminal()


def _with_shipped_configs(args: Sequence[str]) -> list[str]:
    return [
        str(shipped_config(Path(arg))) if before in ("-c", "--config") else arg
        for before, arg in zip(("", *args), args, strict=False)
    ]


@contextmanager
def _teaching_errors() -> Iterator[None]:
    """Turn what parsers and Lightning raise for a user's mistake into one line."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(_one_line(str(error))) from error
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {_one_line(str(error))}") from error
    except yaml.YAMLError as error:
        raise UserError(f"a configuration file is no YAML: {_one_line(str(error))}") from error
    except MisconfigurationException as error:
        raise UserError(_one_line(str(error))) from error


def _one_line(message: str) -> str:
    return " ".join(message.split())


@contextmanager
def _alone_on_the_command_line() -> Iterator[None]:
    """Hide sys.argv while LightningCLI gets its arguments from us: it warns about having both."""
    kept, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = kept


def _calm_terminal() -> None:
    """Silence advertising and notices that name nothing the user could change; every other warning stays."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
    # on few cores, decoding in the training process is the fastest (num_workers is the user's to set)
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    # the logging interval is set by the study, not by the length of an epoch
    warnings.filterwarnings("ignore", message=r".*The number of training batches.*smaller than the logging interval.*")
    # keys travel in the batch itself
    warnings.filterwarnings("ignore", message=r".*Couldn't infer the batch indices.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).addFilter(_no_advertising)


def _no_advertising(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(noise in message for noise in _NOISE)
