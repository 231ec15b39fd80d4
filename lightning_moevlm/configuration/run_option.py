"""Replaces `--run RUN` by the command line that started the run, and its checkpoint.

A run is repeated from its record (`config/`: command line and configuration files as they were), so references such as
`${trainer.max_steps}` follow the options given beside `--run`. `fit` resumes in the same MLflow run; `validate` and
`test` log to a run of their own, with the tag `evaluates`. A job that SLURM restarts gets `--run` by itself. A replay
(`moevlm replay`) trains some steps of a run again, in a run of its own.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.flat_config import flatten
from lightning_moevlm.common.secret_masking import MASK, mask_url_secrets
from lightning_moevlm.common.yaml_text import read_yaml
from lightning_moevlm.contracts.exported_model import is_exported
from lightning_moevlm.tracking.read.run_selection import SHOWN_DIGITS, choose_runs
from lightning_moevlm.tracking.read.runs import find_runs_anywhere, has_run
from lightning_moevlm.tracking.record.config_files import names_config
from lightning_moevlm.tracking.record.provenance import SLURM_JOB_TAG
from lightning_moevlm.tracking.store import has_store, prepare_store, resolve_tracking_uri, runs_dir, sqlite_path
from lightning_moevlm.training.checkpoints.checkpoint_file import find_best_checkpoint

RUN, CHECKPOINT = "--run", "--ckpt_path"
_LOGGER = "--trainer.logger.init_args"
_REPLAY = (
    *("enable_checkpointing=false", "limit_val_batches=0", "num_sanity_val_steps=0", "enable_progress_bar=false"),
    *("min_steps=null", "min_epochs=null"),
)
_RUN_ID, _URI = f"{_LOGGER}.run_id", f"{_LOGGER}.tracking_uri"


@dataclass(frozen=True)
class RecordedRun:
    """A run on disk."""

    folder: Path
    config: Path
    """Folder of its newest record of a training."""

    @property
    def resolved(self) -> Mapping[str, Any]:
        """Its whole configuration."""
        return read_yaml((self.config / "config.yaml").read_text(encoding="utf-8"))

    @property
    def words(self) -> list[str]:
        """Its command line after `moevlm fit`, with the recorded configuration files."""
        words = shlex.split((self.config / "command.txt").read_text(encoding="utf-8"))[2:]
        sources = iter(sorted(self.config.glob("source*_*"), key=lambda path: int(path.name[6:].partition("_")[0])))
        before = ""
        for place, word in enumerate(words):
            if names_config(before, word):
                words[place] = f"{'--config=' if before not in ('-c', '--config') else ''}{next(sources)}"
            before = word
        return words

    @property
    def checkpoint_folders(self) -> list[Path]:
        """Folders of its checkpoints, those of the configuration included."""
        named = [value for key, value in flatten(self.resolved).items() if key.endswith(".dirpath") and value]
        return [self.folder / "checkpoints", *(Path(str(folder)) for folder in named)]


class TrainedModel(NamedTuple):
    """A checkpoint, and the run that it is of."""

    checkpoint: Path
    config: Path
    """File with the whole configuration of its training."""
    folder: Path | None
    """Of the run; None if no run is known."""
    store: str | None
    """MLflow store that has the run; None if it is not known here."""


def find_trained_model(name: str, wanted: str, config: str | None, uri: str | None) -> TrainedModel:
    """Return a checkpoint with its configuration.

    Args:
        name: id, name or folder of a run, or a checkpoint: a .ckpt file, or the folder of an exported model.
        wanted: checkpoint of a run: last, best, or the name of a file; not used if `name` is one.
        config: configuration of the training of a checkpoint of no known run; else None.
        uri: store of the run; None is that beside its folder, or the one in force.

    Raises:
        UserError: no such run, checkpoint or store, a checkpoint of no known run without a configuration, or a
            configuration beside that of a run.
    """
    path = Path(name)
    is_checkpoint = path.suffix == ".ckpt" or is_exported(path)
    if is_checkpoint:
        home = path.absolute().parent.parent
        if not any(home.glob("config*/command.txt")):
            if config is None:
                raise UserError(
                    f"{name} is in the folder of no run, so the configuration of its training is not known: give it, "
                    "-c FILE"
                )
            return TrainedModel(path, Path(config), None, None)
        run, store = _find(str(home), uri, "RUN")
        checkpoint = path
    else:
        run, store = _find(name, uri, "RUN")
        checkpoint = _checkpoint(run, wanted)
    if config is not None:
        raise UserError(
            f"-c is {config}, but {name} is of a run that has the configuration of its training, {run.config}: leave "
            "-c out"
        )
    is_there = _uses_run_logger(run.resolved) and has_run(store, run.folder.name)
    if uri is not None and not is_there:
        raise UserError(f"{_no_run_in(store, run)}: leave --tracking_uri out, or give the store that it has logged to")
    return TrainedModel(checkpoint, run.config / "config.yaml", run.folder, store if is_there else None)


def find_recorded_run(name: str, uri: str | None) -> tuple[RecordedRun, str]:
    """Return a run that has logged to MLflow, and its store.

    Args:
        name: its id, name or folder.
        uri: its store; None is that beside its folder, or the one in force.

    Raises:
        UserError: the run is not here, has no record of a training, or did not log to MLflow.
    """
    run, store = _find(name, uri, "RUN")
    if not _uses_run_logger(run.resolved):
        raise UserError(f"RUN is {name}: it has not logged to MLflow (trainer.logger), so there is no run to replay")
    if not has_run(store, run.folder.name):
        raise UserError(f"{_no_run_in(store, run)}: give its store, --tracking_uri URI")
    return run, store


def replay_words(
    run: RecordedRun, store: str, checkpoint: Path | None, run_name: str, tags: Mapping[str, str], given: Sequence[str]
) -> list[str]:
    """Return the command line that trains a run again from a checkpoint, or from the start, in a run of its own.

    Nothing is validated or saved, and nothing but the caller's callback ends it early.

    Raises:
        UserError: the record masks a secret.
    """
    words = run.words
    for option in (CHECKPOINT, _RUN_ID):
        words = _take(option, words)[1]
    recorded = run.resolved["trainer"]["logger"].get("init_args") or {}
    own = [] if recorded.get("tracking_uri") is None else [_URI, store]
    own += [_RUN_ID, "null", f"{_LOGGER}.run_name", run_name, f"{_LOGGER}.tags", json.dumps(dict(tags))]
    own += [f"--trainer.{key}" for key in _REPLAY]
    own += [] if checkpoint is None else [CHECKPOINT, str(checkpoint)]
    _refuse_masked(run, [*words, *own, *given], given)
    return ["fit", *words, *own, *given]


def expand_run_option(args: Sequence[str]) -> list[str]:
    """Return a command line with `--run RUN` replaced; unchanged without the option.

    Args:
        args: subcommand and options of `moevlm fit|validate|test|predict`; these options override the run's own.

    Raises:
        UserError: the run is not here, has no record or no checkpoint, or its record masks a secret.
    """
    name, rest = _take(RUN, args)
    if name is None:
        name = _find_run_of_restarted_job(args)
        if name is None:
            return list(args)
        rank_zero_info(f"SLURM has restarted this job; it resumes run {name}")
        rest = rest[:1]  # the run's own command line is the same
    subcommand, *given = rest
    run, uri = _find(name, _option(_URI, given))
    checkpoint, given = _take(CHECKPOINT, given)
    own = [CHECKPOINT, str(_checkpoint(run, checkpoint or "last"))]
    if _uses_run_logger(run.resolved):
        own += _logger_words(subcommand, run, uri)
    recorded = run.words
    for option in (CHECKPOINT, _RUN_ID):
        recorded = _take(option, recorded)[1]
    words = [*recorded, *own, *given]
    _refuse_masked(run, words, given)
    return [subcommand, *words]


def _find_run_of_restarted_job(args: Sequence[str]) -> str | None:
    """Return the folder of the run that the same command started before SLURM restarted its job, or None."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is None or restarts == "0" or args[0] != "fit" or _option(CHECKPOINT, args) is not None:
        return None
    store = resolve_tracking_uri(_option(_URI, args))
    for row in find_runs_anywhere(store, {SLURM_JOB_TAG: job}):
        folder = runs_dir(store) / row.experiment_id / row.run_id
        command = folder / "config" / "command.txt"
        is_same = command.is_file() and shlex.split(command.read_text(encoding="utf-8"))[1:] == list(args)
        if is_same and any(folder.glob("checkpoints/last.ckpt")):
            return str(folder)
    return None


def find_run_of_checkpoint(words: Sequence[str]) -> Path | None:
    """Return the folder of the run that holds the checkpoint of a command line, or None."""
    checkpoint = _option(CHECKPOINT, words)
    folder = Path(checkpoint).parent.parent if checkpoint else None
    return folder if folder is not None and (folder / "config").is_dir() else None


def _find(name: str, uri: str | None, label: str = RUN) -> tuple[RecordedRun, str]:
    """Return a run and its store. label: names the argument in messages."""
    folder = Path(name)
    if folder.is_dir():
        database = folder.absolute().parent.parent / "mlflow.db"
        if uri is None and database.exists():
            return _read(folder, name, label), f"sqlite:///{database}"
        return _read(folder, name, label), resolve_tracking_uri(uri)
    store = resolve_tracking_uri(uri)
    if not has_store(store):
        raise UserError(
            f"{label} is {name}: there is no such folder, and no database {sqlite_path(store)} with run names; give "
            "the run's folder, or the store in MLFLOW_TRACKING_URI"
        )
    prepare_store(store)  # MLflow would write its tables into any database that it opens
    rows = choose_runs(store, [name])
    if len(rows) > 1:
        ids = ", ".join(row.run_id[:SHOWN_DIGITS] for row in rows[:4])
        raise UserError(f"{label} is {name}, the name of {len(rows)} runs ({ids}, ...): give one of their ids")
    return _read(runs_dir(store) / rows[0].experiment_id / rows[0].run_id, name, label), store


def _no_run_in(store: str, run: RecordedRun) -> str:
    return f"there is no run {run.folder.name} in {mask_url_secrets(store)}"


def _read(folder: Path, name: str, label: str) -> RecordedRun:
    if not folder.is_dir():
        raise UserError(
            f"{label} is {name}: its folder {folder} is not on this machine; copy it here and give {label} FOLDER"
        )
    configs = sorted(folder.glob("config*/command.txt"), key=lambda path: int(path.parent.suffix[1:] or 0))
    trainings = [path.parent for path in configs if path.read_text(encoding="utf-8").startswith("moevlm fit ")]
    if not trainings:
        raise UserError(
            f"{label} is {name}: {folder} has no record of a training (config/command.txt); give the folder, id or "
            f"name of a run of `moevlm fit`, or -c CONFIG and {CHECKPOINT} FILE"
        )
    return RecordedRun(folder, trainings[-1])


def _checkpoint(run: RecordedRun, wanted: str) -> Path:
    """Return the file of `last`, `best` or a file's name, which may be that in the run's folder."""
    found = [path for folder in run.checkpoint_folders for path in sorted(folder.glob("*.ckpt"))]
    last = next((path for path in found if path.name == "last.ckpt"), None)
    if wanted in ("last", "best"):
        chosen = find_best_checkpoint(last) if wanted == "best" and last is not None else last
    else:
        chosen = next((path for path in found if path.name == wanted), Path(wanted))
    if chosen is None:
        there = f"there are {', '.join(str(path) for path in found)}" if found else "it has saved no checkpoint"
        raise UserError(f"{CHECKPOINT} is {wanted}: run {run.folder} has no such checkpoint; {there}")
    return chosen


def _uses_run_logger(resolved: Mapping[str, Any]) -> bool:
    logger = resolved.get("trainer", {}).get("logger")
    return isinstance(logger, dict) and str(logger.get("class_path")).endswith(".RunLogger")


def _logger_words(subcommand: str, run: RecordedRun, uri: str) -> list[str]:
    recorded = run.resolved["trainer"]["logger"].get("init_args") or {}
    words = [] if recorded.get("tracking_uri") is None and uri == resolve_tracking_uri(None) else [_URI, uri]
    run_id = run.folder.name
    if subcommand == "fit":
        return [*words, _RUN_ID, run_id]
    run_name = f"{subcommand} of {recorded.get('run_name') or run_id[:SHOWN_DIGITS]}"
    tags = f'{{"evaluates": "{run_id}"}}'
    return [*words, _RUN_ID, "null", f"{_LOGGER}.run_name", run_name, f"{_LOGGER}.tags", tags]


def _refuse_masked(run: RecordedRun, words: Sequence[str], given: Sequence[str]) -> None:
    """Refuse a record that has *** in place of a secret."""
    texts = [*run.config.glob("source*_*")]
    keys = [
        key for path in texts for key, value in flatten(read_yaml(path.read_text("utf-8"))).items() if value == MASK
    ]
    for before, word in zip(("", *words), words, strict=False):
        name, equals, value = word.partition("=")
        if MASK in (word, value):
            keys.append((name if equals else before).lstrip("-"))
    missing = [key for key in keys if _option(f"--{key}", given) is None]
    if missing:
        raise UserError(f"the record of run {run.folder} masks {missing[0]}: give it again, --{missing[0]} VALUE")


def _option(option: str, words: Sequence[str]) -> str | None:
    return _take(option, words)[0]


def _take(option: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the last value of an option, written `--x V` or `--x=V`, and the other words."""
    value, others, is_value = None, [], False
    for word in words:
        name, equals, after = word.partition("=")
        if is_value:
            value, is_value = word, False
        elif name == option:
            value, is_value = after, not equals
        else:
            others.append(word)
    if is_value or value == "":
        example = "RUN, an id, name or folder" if option == RUN else "FILE"
        raise UserError(f"{option} needs a value: {option} {example}")
    return value, others
