from lightning_moevlm.study.engines.engine import CHECKPOINT, JOBS_FOLDER, Engine, Handle, Job
from lightning_moevlm.study.engines.local import LocalEngine
from lightning_moevlm.study.engines.ray import RayEngine
from lightning_moevlm.study.engines.slurm import SlurmEngine

__all__ = ["CHECKPOINT", "JOBS_FOLDER", "Engine", "Handle", "Job", "LocalEngine", "RayEngine", "SlurmEngine"]
