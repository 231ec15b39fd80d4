"""Writes runs to MLflow and reads them back.

Reading (`runs`, `links`, `store`) is cheap to import. `RunLogger` and `RunRecord` need Lightning, which takes seconds,
so they are imported on first use: `moevlm sweep status` never waits for them.
"""

import importlib
import os
from typing import TYPE_CHECKING

from lightning_moevlm.tracking.links import run_link, server_command, view_link
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.read.runs import RunRow, find_runs, metric_histories, metric_history
from lightning_moevlm.tracking.store import prepare_store, resolve_tracking_uri

if TYPE_CHECKING:
    from lightning_moevlm.tracking.record.run_record import RunRecord
    from lightning_moevlm.tracking.write.run_logger import RunLogger

__all__ = [
    "Point",
    "RunLogger",
    "RunRecord",
    "RunRow",
    "find_runs",
    "metric_histories",
    "metric_history",
    "prepare_store",
    "resolve_tracking_uri",
    "run_link",
    "server_command",
    "view_link",
]

# Read by MLflow when it is first imported, and every import of it in this package comes after this line.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_NEEDS_LIGHTNING = {
    "RunLogger": "lightning_moevlm.tracking.write.run_logger",
    "RunRecord": "lightning_moevlm.tracking.record.run_record",
}


def __getattr__(name: str) -> object:
    if name in _NEEDS_LIGHTNING:
        return getattr(importlib.import_module(_NEEDS_LIGHTNING[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
