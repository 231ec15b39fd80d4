"""Runs fit, validate, test and predict through LightningCLI, with stricter checks.

- Configurations are merged first and interpolated last (`parser_mode="omegaconf+"`), so a later file or flag changes
  everything that refers to it. Absolute references work although the subcommand is their root.
- Values stored in a checkpoint never override the command line (Lightning #21455).
- The configuration is saved as artifacts of the MLflow run; Lightning's own callback fails on a logger without a
  directory (Lightning #19441).
- A mistake in a configuration is one line and exit code 2.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import SUPPRESS, ArgumentError, Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from lightning_moevlm.common.errors import Diverged, Stopped, UserError, explain_allocation
from lightning_moevlm.common.process_tuning import collect_normally
from lightning_moevlm.common.shipped_files import find_config
from lightning_moevlm.configuration.lightning_notices import quiet_lightning
from lightning_moevlm.configuration.messages.parse_errors import short_message
from lightning_moevlm.configuration.messages.signatures import find_imported_class
from lightning_moevlm.configuration.overlays import NamesMerger, move_values_to_files, sets_entry
from lightning_moevlm.configuration.parsers import (
    DEFAULTS,
    PARSER_OPTIONS,
    list_option_types,
    prepare_parsers,
    refuse_unbuildable_parts,
    user_errors,
)
from lightning_moevlm.configuration.reference_parser import ReferenceParser, References
from lightning_moevlm.configuration.report_once import report_once
from lightning_moevlm.configuration.run_option import RUN, expand_run_option, find_run_of_checkpoint
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.model.initial_weights import defer_initialisation
from lightning_moevlm.tracking import RunRecord
from lightning_moevlm.tracking.record.base_config import resolve_base
from lightning_moevlm.tracking.record.closing_lines import resume_line
from lightning_moevlm.tracking.record.config_files import config_sources
from lightning_moevlm.tracking.record.provenance import code_checkout
from lightning_moevlm.training import VisionLanguageModule, try_schedule
from lightning_moevlm.training.callbacks import DivergenceGuard, FlightRecorder, LastCheckpoint, StopBySignal
from lightning_moevlm.training.callbacks.result_table import WRITE_FEATURES, prediction_writers
from lightning_moevlm.training.checkpoints.atomic_checkpoint import save_atomically
from lightning_moevlm.training.checkpoints.checkpoint_file import inspect_checkpoint, refuse_other_model
from lightning_moevlm.training.checkpoints.optimizer_state import refuse_other_groups, refuse_other_state
from lightning_moevlm.training.checks.optimizer_checks import refuse_vanishing_eps
from lightning_moevlm.training.checks.trainer_checks import (
    refuse_invalid_trainer,
    refuse_other_precision,
    refuse_other_sizes,
    refuse_unsuited_trainer,
)

_INCOMPLETE = "the following arguments are required"
_DESCRIPTIONS = {
    "fit": "Train a model.",
    "validate": "Evaluate a model on the validation split.",
    "test": "Evaluate a model on the test split.",
    "predict": "Run a model on the test split; callbacks such as FeatureWriter write what it returns.",
}
_HELP = {  # Lightning's texts describe what is refused here, or what it does itself
    "ckpt_path": "Checkpoint to resume or to evaluate: a .ckpt file, or with --run RUN also `last` or `best`. "
    "An exported model can be evaluated.",
    "weights_only": "Read checkpoints without running code that they hold. `false` is refused.",
    "trainer.logger": "Logger of the run; by default MLflow. `false` logs nothing.",
}


class CommandLine(LightningCLI):
    """LightningCLI for `VisionLanguageModule` on `ShardDataModule`; it parses `sys.argv`.

    Args:
        asked: the subcommand.
        argv: the command line as typed, for the record.
        speak_again: called when all is built; lets Lightning's messages through.
    """

    def __init__(self, asked: str, argv: Sequence[str], speak_again: Callable[[], None]) -> None:
        self._asked = asked
        self._speak_again = speak_again
        self._stop = StopBySignal()
        references = References(asked)
        options = {**PARSER_OPTIONS, "references": references}
        super().__init__(
            VisionLanguageModule,
            ShardDataModule,
            save_config_callback=RunRecord,
            save_config_kwargs={"argv": ["moevlm", *argv]},
            parser_class=ReferenceParser,
            parser_kwargs={**options, "prog": "moevlm", self._asked: options},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # for modules that save their hyperparameters; ours does not
            trainer_defaults={"callbacks": [self._stop]},
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Default to reading checkpoints without unpickling, and to our table of results; explain our rules."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
        parser.description = _DESCRIPTIONS[subcommand]
        for action in parser._actions:
            if action.dest in _HELP:
                action.help = _HELP[action.dest]
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # of Lightning's table; ResultTable prints ours
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Build only the parser of the given subcommand: each takes a fifth of a second.

        Static in LightningCLI, which calls it on the instance.
        """
        return {self._asked: LightningCLI.subcommands()[self._asked]}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make the seed a number: Lightning also takes true and false, which seed no weights, masks or order."""
        parser.add_argument("--seed_everything", type=int, default=0, help="seed of weights, masks and data order")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Default to our logger and callbacks, and add --run."""
        parser.set_defaults(DEFAULTS)
        text = "id, name or folder of a run to resume or evaluate; loads its configuration and last checkpoint"
        parser.add_argument(RUN, default=SUPPRESS, metavar="RUN", help=text)  # replaced before anything is parsed

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a mistake becomes a line with the allowed values."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            text = short_message(str(error), list_option_types(self._parser(self._asked)))
            run = find_run_of_checkpoint(sys.argv)
            example = "name a configuration, e.g. -c conf/quickstart.yaml"
            remedy = f"give the checkpoint's run, {RUN} {run}" if run is not None else example
            advice = f"; {remedy}" if text.startswith(_INCOMPLETE) else ""
            raise UserError(text + advice) from error

    def before_instantiate_classes(self) -> None:
        """Refuse a missing checkpoint before anything is built or written; drop unwanted callbacks."""
        collect_normally()
        config = self.config[self.subcommand]
        refuse_unbuildable_parts(config.as_dict())
        if self.subcommand == "predict":
            config.trainer.logger = False  # Lightning would open an empty run
        if config.weights_only is False:
            raise UserError(
                "weights_only is false, which lets a checkpoint run code when it is read: remove the option"
            )
        config.weights_only = True  # Lightning's default, null, unpickles checkpoints from servers
        root = Path(config.trainer.default_root_dir or ".")
        self._checkpoint = inspect_checkpoint(config.get("ckpt_path"), self._asked, root)
        if self.subcommand == "fit" and not _lists(config.trainer, FlightRecorder):
            self.trainer_defaults["callbacks"].append(FlightRecorder())
        if _saves(config.trainer) and self.subcommand == "fit":
            self.trainer_defaults["callbacks"].append(LastCheckpoint(self._stop))
        if config.trainer.enable_progress_bar is False and isinstance(config.trainer.callbacks, list):
            config.trainer.callbacks = [
                callback for callback in config.trainer.callbacks if not callback.class_path.endswith(".StepProgress")
            ]

    def instantiate_classes(self) -> None:
        """Build; the whole model draws its weights once."""
        with defer_initialisation(), explain_allocation():
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Refuse unsuited combinations of the built parts, before anything is written."""
        config = self.config[self.subcommand]
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and not isinstance(callback, LastCheckpoint):
                callback.save_last = None  # LastCheckpoint saves it; a fast_dev_run leaves nothing
        refuse_other_precision(config.trainer.precision, self.trainer)
        refuse_other_sizes(self.model.backbone.spec, config.data.as_dict())
        if self.subcommand != "fit" and not config.get("ckpt_path"):
            _warn("no checkpoint is given, so the model is untrained; give --run RUN or --ckpt_path FILE")
        if self.subcommand == "predict" and not prediction_writers(self.trainer):
            _warn(f"the predictions are not saved; to write them to files add {WRITE_FEATURES}")
        save_atomically(self.trainer)
        if self._checkpoint is not None:
            refuse_other_model(self._checkpoint, config.ckpt_path, self.model)
        if self.subcommand == "fit":
            refuse_invalid_trainer(self.trainer)
            if self.model.gradient.any_on:
                refuse_unsuited_trainer(self.trainer)
            refuse_vanishing_eps(self.trainer, self.model.build_optimizer())
            try_schedule(self.model, self.trainer.max_steps, is_endless=self.trainer.max_epochs == -1)
            if self._checkpoint is not None:
                refuse_other_groups(self._checkpoint, self.model)
                refuse_other_state(self._checkpoint, self.model.optimizer_factory)
        self._checkpoint = None

    def after_fit(self) -> None:
        """Raise `Diverged` if the run has diverged."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set, but not declared
        for callback in callbacks:
            if isinstance(callback, DivergenceGuard) and callback.diverged_at is not None:
                text = f"diverged: the training loss is not finite at step {callback.diverged_at}"
                raise Diverged(text if self.trainer.is_global_zero else "")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; if training ends early, print at the end how to resume it."""
        self._speak_again()
        try:
            super()._run_subcommand(subcommand)
        except UserError:
            raise
        except BaseException as error:
            line = ""
            if subcommand == "fit":
                line = resume_line(self.trainer)
                if line and self.trainer.is_global_zero:
                    Console(stderr=True).print(line, soft_wrap=True, highlight=False, markup=False)
            if isinstance(error, SIGTERMException):
                number = self._stop.number or signal.SIGTERM
                where = f" at step {self.trainer.global_step}" if subcommand == "fit" else ""
                lost = "; nothing was saved" if where and not line else ""
                text = f"stopped by {signal.Signals(number).name}{where}{lost}"
                raise Stopped(number, text if self.trainer.is_global_zero else "") from error
            if self._stop.second:
                text = f"stopped at once by {signal.Signals(self._stop.second).name}"
                raise Stopped(self._stop.second, text if self.trainer.is_global_zero else "") from error
            raise

    def _parse_ckpt_path(self) -> None:
        """Do nothing: a checkpoint restores state, it does not configure."""


class _ParsedError(Exception):
    """Ends a rehearsal."""


class _Rehearsal(CommandLine):
    """A command line that is only parsed."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and cache the code's version and the base configuration for the run's record."""
        code_checkout()
        super().parse_arguments(parser, args)
        resolve_base(self._parser(self._asked), config_sources(sys.argv))
        raise _ParsedError


def rehearse(args: Sequence[str]) -> None:
    """Parse `moevlm fit ...` to warm caches of this process and its forks.

    Raises:
        UserError: a mistake in the configuration.
    """
    with suppress(_ParsedError):
        _start(args, _Rehearsal)


def run(args: Sequence[str]) -> None:
    """Run `moevlm fit|validate|test|predict ...`; args start with the subcommand.

    Raises:
        UserError: a mistake in the configuration or in its files.
        KeyboardInterrupt: Ctrl-C; Lightning has closed the run.
    """
    _start(args, CommandLine)


def _start(args: Sequence[str], command_line: type[CommandLine]) -> None:
    prepare_parsers()
    args = expand_run_option(args)
    with TemporaryDirectory() as folder, report_once(Path(folder)), quiet_lightning() as speak_again, user_errors():
        words = move_values_to_files(_with_shipped_configs(args, Path(folder)), Path(folder))
        # on sys.argv: Lightning runs this command line again to start further ranks
        sys.argv = [sys.argv[0], *words]
        try:
            command_line(args[0], args, speak_again)
        except SystemExit as exit_:
            if isinstance(exit_.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from exit_
            raise


def _with_shipped_configs(args: Sequence[str], folder: Path) -> list[str]:
    words: list[str] = []
    merger = NamesMerger(folder)
    rest = list(args)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        is_config, is_entry = flag in ("-c", "--config"), flag.startswith("--") and sets_entry(flag.removeprefix("--"))
        if not (is_config or is_entry) or not (equals or rest):
            words.append(word)
            continue
        value = value if equals else rest.pop(0)
        files = merger.add_file(find_config(Path(value))) if is_config else merger.add_option(flag[2:], value)
        for file in files:
            words += ["-c", str(file)]
    return words


@rank_zero_only
def _warn(line: str) -> None:
    Console(stderr=True).print(f"Warning: {line}", soft_wrap=True, highlight=False, markup=False)


def _saves(trainer: Namespace) -> bool:
    """Return whether a run keeps its last checkpoint; if checkpoints are off, drop the callbacks that save them."""
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    saving = [each for each in callbacks if each is not None and _is_checkpoint(each.class_path)]
    if trainer.enable_checkpointing is False:
        trainer.callbacks = [each for each in callbacks if each is not None and each not in saving]
        return False
    return all(each.init_args.get("save_last") is not False for each in saving) and not trainer.fast_dev_run


def _lists(trainer: Namespace, wanted: type[Callback]) -> bool:
    """Return whether the configuration names this callback."""
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    return any(each is not None and find_imported_class(each.class_path) is wanted for each in callbacks)


def _is_checkpoint(class_path: str) -> bool:
    part = find_imported_class(class_path)
    return part is not None and issubclass(part, ModelCheckpoint)
