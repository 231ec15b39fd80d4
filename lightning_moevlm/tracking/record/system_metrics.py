"""Samples the machine while a run trains: CPU, memory, disk, network, GPU.

The probes are MLflow's. Its monitor is not used: it writes each sample on its own, reads the whole run back every ten
seconds, and at the end waits minutes for a server that is gone. Here a thread samples and the run's logger writes.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that write no run need not wait for MLflow
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

_DEFAULT_INTERVAL = 10.0  # seconds, MLflow's own


class SystemSampler:
    """Samples at once, so that a short run has a sample, and until it is stopped.

    Keys are MLflow's (`system/cpu_utilization_percentage` ...). Steps are whole seconds since `start_ms`, so that a
    resumed run continues.

    Args:
        sink: takes the values and their step; called from the sampling thread.
        start_ms: when the run began, Unix time in milliseconds.
        interval: seconds between samples; None = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, else 10.
    """

    def __init__(
        self, sink: Callable[[Mapping[str, float], int], None], start_ms: int, interval: float | None = None
    ) -> None:
        configured = os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL")
        self._interval = interval or (float(configured) if configured else _DEFAULT_INTERVAL)
        self._sink = sink
        self._start_ms = start_ms
        self._probes = _probes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="SystemSampler", daemon=True)

    def start(self) -> None:
        """Start sampling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling and wait for the thread's end. May be called twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            values: dict[str, float] = {}
            for probe in self._probes:
                probe.collect_metrics()
                values |= {f"system/{key}": float(value) for key, value in probe.aggregate_metrics().items()}
                probe.clear_metrics()
            self._sink(values, max(0, int(time.time() - self._start_ms / 1000)))
            self._stop.wait(self._interval)


def _probes() -> "list[BaseMetricsMonitor]":
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    probes: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    if find_spec("pynvml") is not None:
        with suppress(RuntimeError):  # the probe raises it where the machine has no NVIDIA GPU
            probes.append(GPUMonitor())
    return probes
