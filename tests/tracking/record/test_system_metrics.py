import threading
import time
from collections.abc import Mapping

from lightning_moevlm.tracking.record.system_metrics import SystemSampler


def test_samples_until_stopped() -> None:
    seen: list[tuple[Mapping[str, float], int]] = []
    began_ms = int(time.time() * 1000) - 100_000
    sampler = SystemSampler(lambda values, step: seen.append((dict(values), step)), began_ms, interval=0.05)
    sampler.start()
    deadline = time.monotonic() + 20
    while len(seen) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    sampler.stop()
    sampler.stop()
    count = len(seen)
    assert count >= 3
    values, step = seen[0]
    assert 100 <= step <= time.time() - began_ms / 1000  # seconds since the run began
    assert 0 < values["system/system_memory_usage_percentage"] <= 100
    assert "SystemSampler" not in [thread.name for thread in threading.enumerate()]
    time.sleep(0.15)
    assert len(seen) == count
