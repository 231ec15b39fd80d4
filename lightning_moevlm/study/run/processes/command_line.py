"""Builds the command line and the environment of one run."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_moevlm.common import process_tuning
from lightning_moevlm.common.process_tuning import THREADS, wait_policy

_PROGRAM = (sys.executable, "-m", "lightning_moevlm")


def training_command(base: tuple[Path, ...], overrides: Path) -> list[str]:
    """Return the public command of a run: `python -m lightning_moevlm fit -c BASE... -c OVERRIDES`."""
    configs = [word for file in (*base, overrides) for word in ("-c", str(file))]
    return [*_PROGRAM, "fit", *configs]


def moevlm_command(words: Sequence[str]) -> list[str]:
    """Return a command line of `moevlm` with these arguments."""
    return [*_PROGRAM, *words]


def run_options(run_id: str, checkpoint: Path | None) -> list[str]:
    """Return the options of a run that writes to an MLflow run, and resumes from a checkpoint if there is one."""
    resume = ["--ckpt_path", str(checkpoint)] if checkpoint else []
    return [f"--trainer.logger.init_args.run_id={run_id}", *resume]


def moevlm_arguments(command: Sequence[str]) -> list[str] | None:
    """Return the arguments that a command line gives to `moevlm`, or None if it starts another program."""
    return list(command[len(_PROGRAM) :]) if tuple(command[: len(_PROGRAM)]) == _PROGRAM else None


def share_environment(env: Mapping[str, str], jobs: int, cores: int, slot: int, num_gpus: int) -> dict[str, str]:
    """Return a child's environment: its share of the cores, the allocator's settings, and its GPU if there are any.

    Variables that the user has set stay, except for the GPU: the slot chooses among the visible ones.
    """
    threads = str(max(1, cores // jobs))
    shared = {**process_tuning.ENVIRONMENT, **wait_policy(env), THREADS: threads, "PYTHONUNBUFFERED": "1", **env}
    if num_gpus:
        visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",") if env.get("CUDA_VISIBLE_DEVICES") else []
        shared["CUDA_VISIBLE_DEVICES"] = visible[slot % num_gpus] if visible else str(slot % num_gpus)
    return shared
