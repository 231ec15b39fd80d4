"""Settings of all configuration parsers: options, defaults, YAML dumper, and messages of their errors."""

import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import reduce
from operator import or_
from pickle import UnpicklingError
from typing import Any, get_args

import torch
import yaml
from jsonargparse import ArgumentError, Namespace, set_dumper, set_parsing_settings
from jsonargparse.typing import register_type
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

import lightning_moevlm.model.objectives  # noqa: F401 - imported parts can be selected by their short class names
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.yaml_text import FastSafeDumper
from lightning_moevlm.configuration.lightning_notices import filter_warnings
from lightning_moevlm.configuration.messages.lightning_refusals import find_refusal, is_raised_by
from lightning_moevlm.configuration.messages.parse_errors import short_message
from lightning_moevlm.configuration.part_checks import refuse_unbuildable
from lightning_moevlm.configuration.plugins import load_plugins
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.checkpoints.checkpoint_file import HOLDS_CODE

PARSER_OPTIONS: dict[str, Any] = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False}
SECTIONS = {"trainer": Trainer, "model": VisionLanguageModule, "data": ShardDataModule}
DEFAULTS: dict[str, object] = {
    "trainer.logger": {"class_path": "lightning_moevlm.tracking.RunLogger"},
    "trainer.callbacks": [
        {"class_path": "lightning_moevlm.training.callbacks.Telemetry"},
        {"class_path": "lightning_moevlm.training.callbacks.Liveness"},
        {"class_path": "lightning_moevlm.training.callbacks.DivergenceGuard"},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": "val/task_loss", "save_last": True, "save_on_train_epoch_end": False},
        },
        {"class_path": "lightning_moevlm.training.callbacks.StepProgress"},
        {"class_path": "lightning_moevlm.training.callbacks.ResultTable"},
    ],
    # the whole validation set before the first step: the untrained model is step 0 of every curve
    "trainer.num_sanity_val_steps": -1,
    "trainer.enable_model_summary": False,  # Telemetry reports it in one line, with active parameters
}


def prepare_parsers() -> None:
    """Apply the settings of all parsers in the process, before the first is made."""
    load_plugins()
    order_types(Trainer)
    register_type(torch.device, str, torch.device)  # a default of StochasticWeightAveraging
    # naming any denied path makes jsonargparse enforce its own list (os, subprocess, ...) instead of warning
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True, import_path_denylist=["os", "subprocess"])
    set_dumper("omegaconf+", dump_yaml)
    filter_warnings()


def order_types(part: type) -> None:
    """Read `limit_val_batches: 1` as one batch in every process, and `strategy: DDPStrategy` as that class.

    The parser tries the types of a union in order. `typing` caches unions and takes `Union[float, int]` for equal to
    `Union[int, float]`, so the order would be that of the first one in the process; 1.0 would mean all batches. A text
    is tried after the classes that it may name.
    """
    for forget in typing._cleanups:  # type: ignore[attr-defined]  # the parser builds Optional[...] of the types set here
        forget()
    annotations = part.__init__.__annotations__  # type: ignore[misc]
    for name, hint in annotations.items():
        types = get_args(hint)
        if int in types and float in types:
            annotations[name] = reduce(or_, sorted(types, key=lambda each: each is not int))
        elif str in types and any(getattr(each, "__module__", "").startswith("lightning.") for each in types):
            annotations[name] = reduce(or_, sorted(types, key=lambda each: each is str))


class _Dumper(FastSafeDumper):
    """Quotes texts such as 632471343e91, which the parser would read back as numbers."""


_Dumper.add_representer(Namespace, lambda dumper, value: dumper.represent_dict(value.as_dict()))
# defaults that are members of a text enumeration, as in Lightning's Timer
_Dumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_str(value.value))
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+"), list("-+0123456789.")
)


def dump_yaml(data: object) -> str:
    """Write YAML for jsonargparse, which dumps a merged configuration and reads it back."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def refuse_unbuildable_parts(resolved: Mapping[str, Any]) -> None:
    """Refuse abstract classes and disallowed nulls in any section of a configuration."""
    for section, part in SECTIONS.items():
        refuse_unbuildable(section, part, resolved[section])


def list_option_types(parser: LightningArgumentParser) -> dict[str, object]:
    """Return the annotation of every option by its whole key."""
    actions = [action for action in parser._actions if action.dest and not action.dest.endswith(".help")]
    return {action.dest: getattr(action, "_typehint", None) or action.type for action in actions}


def _yaml_fault(error: yaml.YAMLError) -> str:
    """Return the fault and its place, without the parser's name for a text in memory."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return _one_line(str(error))
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}; check brackets, quotes and indents"


@contextmanager
def user_errors(parser: LightningArgumentParser | None = None) -> Iterator[None]:
    """Turn errors of parsers and Lightning about a user's mistake into a `UserError` of one line."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(short_message(str(error), list_option_types(parser) if parser else None)) from error
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {_one_line(str(error))}") from error
    except yaml.YAMLError as error:
        raise UserError(f"a configuration file is not valid YAML: {_yaml_fault(error)}") from error
    except UnpicklingError as error:  # of a server's checkpoint; others were inspected before
        raise UserError(f"the checkpoint {HOLDS_CODE}") from error
    except MisconfigurationException as error:
        text = find_refusal(error) or _one_line(str(error))
        if text == "No supported gpu backend found!":  # Lightning's own line has no remedy
            text = "trainer.accelerator: no GPU is found; give cpu or auto, or install a torch build that sees the GPU"
        raise UserError(text) from error
    except ModuleNotFoundError as error:
        if str(error.name).startswith(__package__):
            raise
        raise UserError(
            f"{_one_line(str(error))}; install the package that the option needs, or choose another"
        ) from error
    except UserError:
        raise
    except Exception as error:
        refused = find_refusal(error)
        if refused is None and isinstance(error, ValueError) and is_raised_by(error, "jsonargparse"):
            refused = short_message(str(error), list_option_types(parser) if parser else None)
        if refused is None:
            raise
        raise UserError(refused) from error


def _one_line(message: str) -> str:
    return " ".join(message.split())
