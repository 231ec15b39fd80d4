"""What is set before torch is loaded: the allocator, how threads wait, and how many there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_moevlm.common import process_tuning
from lightning_moevlm.common.process_tuning import set_thread_defaults, wait_policy
from lightning_moevlm.study.run.processes.command_line import share_environment
from tests.conftest import PROJECT

_FAULTS = """
import resource, sys
from lightning_moevlm.common import process_tuning
import numpy as np

if sys.argv[1] == "kept":
    assert process_tuning.keep_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2**24, np.float32).fill(1)  # 64 MiB, 16384 pages
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))
"""


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="page faults of glibc's allocator")
def test_memory_that_was_freed_is_not_faulted_in_again() -> None:
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "GLIBC_TUNABLES": ""}
    faults = {}
    for how in ("kept", "by default"):
        command = [sys.executable, "-c", _FAULTS, how]
        faults[how] = int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    assert faults["kept"] < 8
    assert faults["by default"] >= 32  # 16384 pages, or 32 where they are huge


def test_threads_that_wait_sleep_unless_the_user_says_how_they_wait() -> None:
    assert wait_policy({}) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "500"}
    for own in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        assert wait_policy({own: "1"}) == {}
        assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & (share_environment({own: "1"}, 1, 2, 0, 0).keys() - {own})
    assert share_environment({}, jobs=1, cores=2, slot=0, num_gpus=0)["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_quota_limits_threads_where_a_process_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_tuning, "_cores_by_affinity", lambda: 64)
    monkeypatch.setattr(process_tuning, "_cores_by_quota", lambda *_: 3)
    assert process_tuning.count_usable_cores() == 3
    for computes, given, expected in ((True, {}, "3"), (True, {"OMP_NUM_THREADS": "8"}, "8"), (False, {}, None)):
        env = dict(given)
        set_thread_defaults(env, computes)
        assert env.get("OMP_NUM_THREADS") == expected
        assert env["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setattr(process_tuning, "_cores_by_quota", lambda *_: 2**31)
    env = {}
    set_thread_defaults(env, computes=True)
    assert "OMP_NUM_THREADS" not in env  # OpenMP counts the cores of its affinity, Lightning divides them among ranks


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4),
        ("0::/a\n", {"a/cpu.max": "50000 100000\n", "cpu.max": "800000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        (
            "4:cpu,cpuacct:/x\n3:memory:/x\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)
def test_quotas_of_containers(tmp_path: Path, membership: str, files: dict[str, str], expected: int | None) -> None:
    root = tmp_path / "groups"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    found = process_tuning._cores_by_quota(tmp_path / "membership", root)
    assert found == (expected or 2**31)
    assert process_tuning._cores_by_quota(tmp_path / "nowhere", root) == 2**31


def test_the_command_sets_them_before_torch_is_loaded() -> None:
    program = (
        "import os, sys; from lightning_moevlm.cli import main as cli\n"
        "cli._dispatch = lambda _: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules) or 0\n"
        "sys.exit(cli.main(['fit']))"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=PROJECT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "PASSIVE False\n"
