"""A whole small study without Lightning: configs are merged by OmegaConf, runs are `tiny_training.py`.

Run as a program it is a sweep of its own process, so that tests can kill it:

    python -m tests.study.tiny_study FILE [ENGINE]
"""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.plan_study import plan_study
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.engines import JOBS_FOLDER, Engine, LocalEngine, RayEngine, SlurmEngine
from lightning_moevlm.study.run.execute import Tally, execute
from lightning_moevlm.study.run.ledger import RunState, hold_study
from lightning_moevlm.study.run.mlflow_runs import StudyRuns, find_tracking_uri, open_experiment
from lightning_moevlm.study.run.to_do import find_waiting_runs

BASE = {
    "seed_everything": 0,
    "model": {
        "speed": 0.5, "skew": 0.1, "crash_at": None, "nan_at": None, "seconds_per_step": 0.0, "checkpoints": True,
        "validate_every": 1, "worse": 0.0, "seed": "${seed_everything}",
    },
    "trainer": {"max_steps": 1, "max_epochs": 5, "logger": {"class_path": "RunLogger", "init_args": {}}},
}  # fmt: skip
STUDY: dict[str, Any] = {
    "question": "Does a faster model learn faster?",
    "base": ["base.yaml"],
    "arms": {"baseline": None, "fast": {"model.speed": 0.9}},
    "seeds": [0, 1],
    "budget": {"max_steps": 4},
    "primary": {"metric": "val/task_loss", "direction": "lower"},
}


class Card(NamedTuple):
    """A `ModelCard`; the real one lies beside models that import torch."""

    total_parameters: int
    active_parameters: int
    active_flops_per_sample: int


class Silent:
    """A watcher that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def run_started(self, run: PlannedRun, state: RunState) -> None:
        self.lines.append(f"start {run.name}")

    def run_ended(self, run: PlannedRun, state: RunState) -> None:
        self.lines.append(f"{state.status} {run.name}")

    def tick(self) -> None:
        pass

    def show(self, line: str) -> None:
        self.lines.append(line)


def write_project(
    folder: Path, uri: str, study: dict[str, Any] | None = None, model: dict[str, Any] | None = None
) -> Path:
    """Write base.yaml and tiny.yaml and return the study file."""
    base = OmegaConf.merge(BASE, {"model": model or {}, "trainer": {"logger": {"init_args": {"tracking_uri": uri}}}})
    (folder / "base.yaml").write_text(OmegaConf.to_yaml(base))
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(STUDY | (study or {}), sort_keys=False))
    return file


def resolve(files: list[Path], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = OmegaConf.merge(*(OmegaConf.load(file) for file in files), overrides)
    return OmegaConf.to_container(merged, resolve=True)


def describe(resolved: dict[str, Any]) -> Card:
    return Card(1_000_000, 400_000, 12_000_000)


def plan_of(file: Path) -> Plan:
    return plan_study(read_study(file), resolve, describe, sweeps=file.parent / "sweeps")


def command_of(plan: Plan):
    script = Path(__file__).with_name("tiny_training.py")

    def command(overrides: Path, run_id: str, checkpoint: Path | None) -> list[str]:
        resume = [str(checkpoint)] if checkpoint else []
        return [sys.executable, str(script), str(plan.study.base[0]), str(overrides), run_id, *resume]

    return command


def engine_of(name: str = "local") -> Engine:
    """Return an engine that works on this machine."""
    if name == "ray":
        return RayEngine(num_cpus=1)
    if name in ("slurm", "fake_slurm"):
        return SlurmEngine(cluster="local" if name == "slurm" else "slurm", cpus=1, minutes=5)
    return LocalEngine(num_gpus=0)


def sweep(
    file: Path,
    jobs: int = 2,
    retry: bool = False,
    engine: Engine | None = None,
    timeout_minutes: float | None = None,
    silence_seconds: float = 300.0,
) -> tuple[Plan, StudyRuns, Tally, Silent]:
    """Run a study to its end in this process."""
    plan, watcher, engine = plan_of(file), Silent(), engine or engine_of()
    with hold_study(plan.folder):
        experiment = open_experiment(find_tracking_uri(plan), plan.comparison.name)
        waiting = find_waiting_runs(plan, experiment, engine, retry)
        at_once = engine.open(plan.folder / JOBS_FOLDER, jobs, len(waiting))
        try:
            tally = execute(
                plan,
                experiment,
                waiting,
                command_of(plan),
                watcher,
                engine,
                at_once,
                timeout_minutes,
                silence_seconds,
            )
        finally:
            engine.close()
    return plan, experiment, tally, watcher


if __name__ == "__main__":
    _, _, done, told = sweep(Path(sys.argv[1]), engine=engine_of(*sys.argv[2:]))
    print(os.getpid(), done.started, done.stopped, *told.lines, sep="\n")
