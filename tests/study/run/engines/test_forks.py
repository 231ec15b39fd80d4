"""Runs as forks of one process: real ones, but their server imports nothing. `test_forked_runs.py` has the true one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lightning_moevlm.study.run.engines import JOBS_FOLDER, Job, LocalEngine
from lightning_moevlm.study.run.engines.local import SERVER_LOG
from lightning_moevlm.study.run.processes.child_process import ProcessEnd, is_alive
from tests.study.run.engines.test_engines import job_of
from tests.study.run.test_execute import REPOSITORY
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks that end with their server are of Linux")

SLEEP = "import time; time.sleep(60)"
PROGRAM = (sys.executable, "-m", "tests.study.fork_program")


@pytest.fixture(autouse=True)
def quick_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_moevlm.study.run.engines.forks._SERVER", PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(num_gpus=0)
    engine.open(tmp_path / JOBS_FOLDER, 3, 8)
    yield engine
    engine.close()


def run(folder: Path, ticket: str, code: str) -> Job:
    """Return a job that the public command would carry out, and `fork_program` as Python code."""
    job = job_of(folder, "", ticket=ticket)
    return replace(job, command=(sys.executable, "-m", "lightning_moevlm", code), log=folder / f"{ticket}.txt")


def end_of(engine: LocalEngine, ticket: str) -> ProcessEnd:
    found: list[ProcessEnd] = []
    wait_for(lambda: found.extend(filter(None, [engine.poll(ticket)])) or found)
    return found[0]


def server_of(engine: LocalEngine) -> psutil.Process:
    assert engine._server is not None
    return psutil.Process(engine._server.pid)


def begun(engine: LocalEngine, folder: Path, *tickets: str) -> list[psutil.Process]:
    """Submit runs that sleep; return their processes."""
    for ticket in tickets:
        engine.submit(run(folder, ticket, SLEEP))
    wait_until_reported(engine, *tickets)
    return server_of(engine).children()


def wait_until_reported(engine: LocalEngine, *tickets: str) -> None:
    wait_for(lambda: engine._server.read_news() or set(tickets) <= engine._server.started.keys())


def test_exit_codes_output_and_surroundings(engine: LocalEngine, tmp_path: Path) -> None:
    told = "import os, sys; print(os.getsid(0) == os.getpid(), os.getcwd(), os.environ['TOLD'], repr(sys.stdin.read()))"
    codes = {"good": (told, 0), "refused": ("sys.exit(2)", 2), "raised": ("1 / 0", 1)}
    for ticket, (code, expected) in codes.items():
        before = time.time()
        handle = engine.submit(run(tmp_path, ticket, code))
        assert handle.pid == server_of(engine).pid  # a run lives and dies with its server
        ended = end_of(engine, ticket)
        assert (ended.code, ended.reason) == (expected, "")
        assert before <= ended.started <= ended.ended <= time.time()
    header, output = (tmp_path / "good.txt").read_text().splitlines()
    assert header.endswith(f"{sys.executable} -m lightning_moevlm {told}")
    assert output == f"True {tmp_path} this ''"
    assert (tmp_path / "raised.txt").read_text().endswith("ZeroDivisionError: division by zero\n")


def test_the_wait_for_the_server_is_not_time_of_the_run(engine: LocalEngine, tmp_path: Path) -> None:
    begun(engine, tmp_path, "a")
    server = server_of(engine)
    server.suspend()
    engine.submit(run(tmp_path, "b", "pass"))
    time.sleep(1.0)
    resumed = time.time()
    server.resume()
    assert end_of(engine, "b").started >= resumed


def test_runs_share_nothing_that_one_of_them_changes(engine: LocalEngine, tmp_path: Path) -> None:
    code = "import os; from glob import glob; print(os.environ.get('LEFT')); os.environ['LEFT'] = 'behind';"
    code += " os.chdir('/'); print([os.readlink(file) for file in glob('/proc/self/fd/*') if os.path.exists(file)])"
    begun(engine, tmp_path, "beside")
    for ticket in ("a", "b"):
        engine.submit(run(tmp_path, ticket, code))
        assert end_of(engine, ticket).code == 0
        _, left, files = (tmp_path / f"{ticket}.txt").read_text().splitlines()
        assert left == "None"
        assert str(tmp_path / f"{ticket}.txt") in files
        assert not any(word in files for word in ("socket", "pidfd", "beside"))  # what the server speaks by


def test_a_run_looks_like_the_main_program(engine: LocalEngine, tmp_path: Path) -> None:
    """It ends like one, too: threads are waited for, then exit handlers run."""
    code = (
        "import atexit, multiprocessing as mp, threading, time\n"
        "print(mp.parent_process(), mp.current_process().name, mp.get_start_method(allow_none=True))\n"
        "print(sys.argv, sys.modules['__main__'].__spec__.name)\n"
        "atexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()\n"
        "sys.excepthook = lambda *_: print('hook')\n"
    )
    surroundings = ["None MainProcess None", f"['{REPOSITORY}/lightning_moevlm/__main__.py'] lightning_moevlm.__main__"]
    for ticket, more, exit_code, told in (("a", "1 / 0", 1, ["hook"]), ("b", "", 0, []), ("c", "sys.exit(3)", 3, [])):
        engine.submit(run(tmp_path, ticket, code + more))
        assert end_of(engine, ticket).code == exit_code
        output = (tmp_path / f"{ticket}.txt").read_text().splitlines()
        assert output[output.index(surroundings[0]) :] == [*surroundings, *told, "thread", "at exit"]


def test_a_killed_run_does_not_end_another(engine: LocalEngine, tmp_path: Path) -> None:
    one, other = begun(engine, tmp_path, "a", "b")
    one.kill()
    codes: dict[str, int | None] = {}
    wait_for(lambda: codes.update({t: e.code for t in "ab" if (e := engine.poll(t)) is not None}) or codes)
    assert list(codes.values()) == [-signal.SIGKILL]
    assert is_alive(other)
    engine.cancel(list({"a", "b"} - codes.keys()))
    assert not is_alive(other)


def test_cancelled_runs_report_the_signal_that_ended_them(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_moevlm.study.run.processes.child_process.PATIENCE_SECONDS", 0.5)
    deaf = "import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True);" + SLEEP
    child = "import subprocess, sys; subprocess.Popen(['sleep', '61']); print('has one', flush=True);" + SLEEP
    for ticket, code in (("deaf", deaf), ("parent", child)):
        engine.submit(run(tmp_path, ticket, code))
    for ticket, word in (("deaf", "\ndeaf"), ("parent", "\nhas one")):
        wait_for(lambda ticket=ticket, word=word: word in (tmp_path / f"{ticket}.txt").read_text())
    [below] = [each for each in server_of(engine).children(recursive=True) if each.name() == "sleep"]
    engine.cancel(["deaf", "parent"])
    assert [engine.poll(ticket).code for ticket in ("deaf", "parent")] == [-signal.SIGKILL, -signal.SIGTERM]
    assert not is_alive(below)


def test_cancelled_while_its_server_is_stopped(engine: LocalEngine, tmp_path: Path) -> None:
    """One has begun, one has not."""
    [sleeping] = begun(engine, tmp_path, "a")
    server_of(engine).suspend()
    engine.submit(run(tmp_path, "b", f"{SLEEP}; print('worked')"))
    engine.cancel(["a", "b"])
    assert [engine.poll(ticket).code for ticket in ("a", "b")] == [-signal.SIGTERM] * 2
    assert not is_alive(sleeping)
    assert "\nworked" not in (tmp_path / "b.txt").read_text()


def test_a_run_over_its_time_is_ended(engine: LocalEngine, tmp_path: Path) -> None:
    engine.submit(replace(run(tmp_path, "a", SLEEP), timeout_seconds=0.6))
    ended = end_of(engine, "a")
    assert ended.code == -signal.SIGTERM
    assert ended.reason == "not done after 0.01 minutes (timeout_minutes), so it was ended"


def test_runs_end_with_their_server_and_the_next_has_a_new_one(engine: LocalEngine, tmp_path: Path) -> None:
    runs, before = begun(engine, tmp_path, "a", "b"), server_of(engine)
    before.kill()
    assert [end_of(engine, ticket).code for ticket in ("a", "b")] == [-signal.SIGKILL] * 2
    assert not any(map(is_alive, runs))
    engine.submit(run(tmp_path, "c", "print('here')"))
    assert end_of(engine, "c").code == 0
    assert server_of(engine) != before


def test_a_server_that_cannot_start_costs_no_run(tmp_path: Path) -> None:
    """The sweep starts a run again that ended without an exit code; the engine then makes it a program of its own."""
    engine = LocalEngine(num_gpus=0)
    engine.open(tmp_path / JOBS_FOLDER, 1, 2)
    lost = ProcessEnd(None, f"the fork server ended before the run started, see {SERVER_LOG}")
    for ticket in ("a", "b"):
        engine.submit(replace(run(tmp_path, ticket, "fails"), folder=REPOSITORY))
        ended = end_of(engine, ticket)
        assert ended == lost if ticket == "a" else ended.code == 2  # `moevlm fails` is no command
    assert "fails" in (tmp_path / "b.txt").read_text().splitlines()[-1]
    log = (tmp_path / JOBS_FOLDER / SERVER_LOG).read_text()
    assert log.count("it cannot be imported") == 1  # it was not tried again
    engine.close()


def test_other_programs_and_other_environments_are_not_forked(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(engine, tmp_path, "a")
    handle = engine.submit(job_of(tmp_path, "print('by itself')", ticket="b"))
    assert handle.pid != server_of(engine).pid
    assert end_of(engine, "b").code == 0
    other = replace(run(tmp_path, "c", "print(1)"), environment={"TOLD": "something else"})
    assert engine.submit(other).pid != server_of(engine).pid
    assert end_of(engine, "c").code == 2  # the real `moevlm` knows no such command
    engine.cancel(["a"])
    monkeypatch.setattr("lightning_moevlm.study.run.engines.local._visible_gpus", lambda: 1)
    for plain in (LocalEngine(num_gpus=0, fork=False), LocalEngine()):  # a GPU cannot be taken over by a fork
        plain.open(tmp_path / JOBS_FOLDER, 1, 1)
        plain.submit(run(tmp_path, "d", "no command"))
        assert end_of(plain, "d").code == 2
        assert plain._server is None


def test_kill_of_the_sweep_ends_server_and_runs(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lightning_moevlm.study.run.engines import forks\n"
        "from tests.study.run.engines.test_forks import *\n"
        f"forks._SERVER = PROGRAM; folder = Path({str(tmp_path)!r})\n"
        "engine = LocalEngine(num_gpus=0); engine.open(folder / 'jobs', 2, 2)\n"
        "print(*[each.pid for each in begun(engine, folder, 'a', 'b')], engine._server.pid, flush=True); time.sleep(60)"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert sweep.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in sweep.stdout.readline().split()]
    assert len(processes) == 3
    sweep.kill()
    sweep.wait()
    wait_for(lambda: not any(map(is_alive, processes)))


def test_a_closed_engine_leaves_nothing(tmp_path: Path) -> None:
    engine = LocalEngine(num_gpus=0)
    engine.open(tmp_path / JOBS_FOLDER, 2, 8)
    [sleeping] = begun(engine, tmp_path, "a")
    server = server_of(engine)
    engine.close()
    wait_for(lambda: not is_alive(server) and not is_alive(sleeping))
    assert os.environ.get("TOLD") is None


def served_by(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> LocalEngine:
    """Return an engine whose server is the Python program, which may call `serve_and_run()`."""
    needed = "import os, time; from tests.study.fork_program import serve_and_run\n"
    monkeypatch.setattr("lightning_moevlm.study.run.engines.forks._SERVER", (sys.executable, "-c", needed + program))
    engine = LocalEngine(num_gpus=0)
    engine.open(folder / JOBS_FOLDER, 3, 8)
    return engine


def test_no_run_outlives_a_server_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python waits for the children of a process that ends by an error; the engine would begin the run again."""
    failing = "def fail(): time.sleep(1); raise OSError\ntime.time = fail  # called as a run has begun\nserve_and_run()"
    engine = served_by(failing, tmp_path, monkeypatch)
    code = "import time; print('one', flush=True); time.sleep(30); print('two', flush=True)"
    engine.submit(replace(run(tmp_path, "a", code), folder=REPOSITORY))
    assert end_of(engine, "a").code is None  # the sweep starts it again
    assert "\none" in (tmp_path / "a.txt").read_text()
    assert "\ntwo" not in (tmp_path / "a.txt").read_text()
    engine.close()


def test_an_interrupted_server_ends_its_runs(engine: LocalEngine, tmp_path: Path) -> None:
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process inherits what is ignored
    runs = begun(engine, tmp_path, "a", "b")
    signal.signal(signal.SIGINT, ours)
    server_of(engine).send_signal(signal.SIGINT)
    assert [end_of(engine, ticket).code for ticket in ("a", "b")] == [-signal.SIGKILL] * 2
    assert not any(map(is_alive, runs))


def test_the_end_of_a_server_is_seen_though_another_process_holds_its_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = served_by("os.fork() or (time.sleep(20), os._exit(0))\nserve_and_run()", tmp_path, monkeypatch)
    engine.submit(run(tmp_path, "a", SLEEP))
    wait_until_reported(engine, "a")
    holder = min(server_of(engine).children(), key=lambda child: child.create_time())
    server_of(engine).kill()
    assert end_of(engine, "a").code == -signal.SIGKILL
    assert is_alive(holder)
    holder.kill()
    engine.close()


def test_cancelled_while_its_server_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_moevlm.study.run.processes.child_process.PATIENCE_SECONDS", 0.5)
    engine = served_by("time.sleep(600)", tmp_path, monkeypatch)  # as an import may that waits for a dead disk
    engine.submit(run(tmp_path, "a", "print('worked')"))
    engine.cancel(["a"])
    assert engine.poll("a").code in (-signal.SIGTERM, -signal.SIGKILL)
    assert (tmp_path / "a.txt").read_text().count("\n") == 1  # nor did it begin by itself
    engine.close()


def test_cancelled_as_its_server_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served_by("time.sleep(1)", tmp_path, monkeypatch)
    engine.submit(run(tmp_path, "a", "print('worked')"))
    engine.cancel(["a"])
    assert engine.poll("a").code == -signal.SIGTERM
    assert (tmp_path / "a.txt").read_text().count("\n") == 1
    engine.close()


def test_a_long_command_line(engine: LocalEngine, tmp_path: Path) -> None:
    begun(engine, tmp_path, "a")
    engine.submit(run(tmp_path, "b", "pass #" + "long" * 200_000))
    assert end_of(engine, "b").code == 0
