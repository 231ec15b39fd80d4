"""Engines of a sweep: where its runs start, on this machine, on SLURM or on Ray."""

from lightning_moevlm.study.run.engines.engine import CHECKPOINT, JOBS_FOLDER, Engine, Handle, Job
from lightning_moevlm.study.run.engines.local import LocalEngine
from lightning_moevlm.study.run.engines.ray import RayEngine
from lightning_moevlm.study.run.engines.slurm import SlurmEngine

__all__ = ["CHECKPOINT", "JOBS_FOLDER", "Engine", "Handle", "Job", "LocalEngine", "RayEngine", "SlurmEngine"]
