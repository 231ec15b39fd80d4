"""Estimates how long a study takes here: times a few steps of each arm through the public command line.

    run = start + validations x validation + steps x step

start: imports, building and ending. A probe tracks nothing and writes no checkpoint, so a real run takes somewhat
longer.
"""

import copy
import dataclasses
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.process_tuning import count_usable_cores
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.processes.command_line import share_environment
from lightning_moevlm.study.run.processes.overrides_file import write_overrides
from lightning_moevlm.study.run.processes.run_files import log_tail

NUM_STEPS = 8
_WARM_UP = 3
_TIMES = "lightning_moevlm.training.callbacks.StepTimes"
_LEFT_OUT = ("ModelCheckpoint", "ResultTable", "StepProgress")

# overrides file -> command line
ProbeCommand = Callable[[Path], list[str]]


class Probe(NamedTuple):
    """Seconds of one arm on this machine."""

    start: float  # all but steps and validations
    validation: float  # one validation
    step: float  # median of the steps after warm-up

    def run_seconds(self, run: PlannedRun, minutes: float | None) -> float:
        """Return the estimate for a whole run; minutes: of a budget by the clock."""
        if run.max_steps is None:
            assert minutes is not None
            return self.start + 60 * minutes
        return self.start + num_validations(run.resolved, run.max_steps) * self.validation + run.max_steps * self.step


def probe_arms(plan: Plan, command: ProbeCommand, tick: Callable[[str], None]) -> dict[str, Probe]:
    """Probe each arm with its first seed, one after the other; `tick` gets each arm's name before it starts.

    Raises:
        UserError: An arm does not train; the message is that of its run.
    """
    first = {run.arm: run for run in reversed(plan.runs)}
    probes = {}
    for arm in plan.comparison.arms:
        tick(arm.name)
        probes[arm.name] = _probe(first[arm.name], command)
    return probes


def num_validations(resolved: Mapping[str, Any], max_steps: int) -> int:
    """Return the number of validations: untrained, at each interval, at the end; with intervals in epochs the least."""
    trainer = resolved["trainer"]
    untrained = 1 if trainer.get("num_sanity_val_steps", 2) else 0
    interval = trainer.get("val_check_interval")
    if not isinstance(interval, int) or trainer.get("check_val_every_n_epoch") is not None:
        return untrained + 1
    steps = max(1, interval // int(trainer.get("accumulate_grad_batches", 1)))
    return untrained + -(-max_steps // steps)


def _probe(run: PlannedRun, command: ProbeCommand) -> Probe:
    with TemporaryDirectory() as place:
        folder = Path(place)
        times = folder / "times.json"
        log = folder / "log.txt"
        overrides = write_overrides(dataclasses.replace(run, overrides=_short(run, folder, times)), folder)
        env = share_environment(os.environ, jobs=1, cores=count_usable_cores(), slot=0, num_gpus=0)
        began = time.perf_counter()
        with log.open("wb") as sink:
            code = subprocess.run(
                command(overrides),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        seconds = time.perf_counter() - began
        if code or not times.exists():
            tail = log_tail(log)
            raise UserError(f"arm {run.arm!r} does not train (exit code {code}): {tail[-1] if tail else 'no output'}")
        measured = json.loads(times.read_text(encoding="utf-8"))
    steps, validations = measured["step_seconds"], measured["validation_seconds"]
    return Probe(
        start=max(0.0, seconds - sum(steps) - sum(validations)),
        validation=validations[-1] if validations else 0.0,  # the first one warms up
        step=statistics.median(steps[_WARM_UP:] or steps),
    )


def _short(run: PlannedRun, folder: Path, times: Path) -> dict[str, Any]:
    """Return the run's overrides for a few steps, with a clock and without anything that writes."""
    overrides = copy.deepcopy(run.overrides)
    callbacks = [
        callback
        for callback in run.resolved["trainer"].get("callbacks") or []
        if not str(callback["class_path"]).endswith(_LEFT_OUT)
    ]
    overrides["trainer"] = overrides["trainer"] | {
        "max_steps": NUM_STEPS,
        "default_root_dir": str(folder),
        "logger": False,
        "callbacks": [*callbacks, {"class_path": _TIMES, "init_args": {"file": str(times)}}],
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    return overrides
