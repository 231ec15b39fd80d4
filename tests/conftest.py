"""What more than one folder of tests needs: a small real set and a migrated database, made once per session."""

import atexit
import ctypes
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from filelock import FileLock

from lightning_moevlm.cli.main import main

if TYPE_CHECKING:
    from mlflow.entities import Run

    from tests.mlflow_server import MlflowServer

PROJECT = Path(__file__).parent.parent
_INHERITED = (
    "COLUMNS",
    "LINES",
    "FORCE_COLOR",
    "NO_COLOR",
    "PYTHONWARNINGS",
    "PYTHONDONTWRITEBYTECODE",
    "MLFLOW_",
    "MOEVLM_TRACEBACK",
    "SLURM_",
    "RAY_",
    "MALLOC_",
)
_INHERITED += ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_", "PL_", "OMP_WAIT_POLICY", "GOMP_", "KMP_")
_PR_SET_CHILD_SUBREAPER = 36


def pytest_configure(config: pytest.Config) -> None:
    """Let the tests run alike on every machine: what they would inherit from terminal, shell and scheduler is set here.

    Orphans stay zombies until these tests are over, as in a container whose process 1 reaps none.
    """
    for name in [name for name in os.environ if name.startswith(_INHERITED)]:
        del os.environ[name]
    sys.dont_write_bytecode = False  # or every process, of which tests start many, compiles the package anew
    own_cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    os.environ.setdefault("MPLCONFIGDIR", f"{own_cache}/matplotlib")  # finding all fonts again takes seconds
    os.environ["XDG_CACHE_HOME"] = cache = (
        tempfile.mkdtemp()
    )  # not what the user has cached, nor a home that is read-only
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.umask(0o022)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and by `nohup`
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if not config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        _prepare_tests()


def _prepare_tests() -> None:
    """Prepare a process that runs tests; one that only hands them to workers does not wait for torch."""
    from lightning_moevlm.model.dispatch.auto.own_table import GIVEN
    from lightning_moevlm.model.dispatch.auto.timings_table import SHIPPED
    from tests import fast_parser

    os.environ[GIVEN] = str(SHIPPED)  # tests measure no dispatchers, and choose alike everywhere
    fast_parser.install()


def pytest_collection_finish() -> None:
    """Spare the collector the million objects of imports and collected tests: a tenth of the time of short tests."""
    gc.collect()
    gc.freeze()


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a path that the first worker makes for all of them; nobody writes there later."""
    base = factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    path, done = shared / name, shared / f"made-{name}"
    with FileLock(shared / f"making-{name}.lock"):
        if not done.exists():
            make(path)
            done.touch()
    return path


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 scenes of 32 pixels in shards of 16, jpg."""
    from lightning_moevlm.data.write.demo.scenes import build_scenes

    def build(root: Path) -> None:
        build_scenes(root, 150, 32, "jpg", 16, seed=3, samples_per_shard=16, vocab_size=400, force=False)

    return make_once(tmp_path_factory, "scenes", build)


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow; making one takes seconds, copying it milliseconds."""
    from lightning_moevlm.tracking.store import prepare_store

    return make_once(tmp_path_factory, "mlflow.db", lambda path: prepare_store(f"sqlite:///{path}"))


@pytest.fixture
def workplace(tmp_path: Path, scenes_root: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in: the shipped configurations, the small set where they look for it, an empty store."""
    furnish(tmp_path, scenes_root, migrated_database)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def shared_workplace(tmp_path_factory: pytest.TempPathFactory, scenes_root: Path, migrated_database: Path) -> Path:
    """A workplace that the tests of a file share; commands run there by `run_in`."""
    folder = tmp_path_factory.mktemp("workplace")
    furnish(folder, scenes_root, migrated_database)
    return folder


def run_in(folder: Path, *arguments: str) -> None:
    """Run a command in a workplace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert main([*arguments]) == 0


def runs(workplace: Path) -> "list[Run]":
    """Every run of the store, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workplace}/runs/mlflow.db")
    return client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["start_time"])


def last_checkpoint(workplace: Path) -> Path:
    """The last checkpoint of the only run."""
    (path,) = workplace.glob("runs/**/last.ckpt")
    return path


def step_of(checkpoint: Path) -> int:
    """The optimiser steps that a checkpoint has done."""
    import torch

    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def furnish(folder: Path, scenes_root: Path, migrated_database: Path) -> None:
    """Make a folder a workplace."""
    for shipped in ("conf", "ablations"):
        shutil.copytree(PROJECT / shipped, folder / shipped)
    (folder / "data/shards").mkdir(parents=True)
    for name in ("scenes", "facts"):  # demo sets are alike to a reader
        (folder / "data/shards" / name).symlink_to(scenes_root, target_is_directory=True)
    (folder / "runs").mkdir()
    shutil.copyfile(migrated_database, folder / "runs/mlflow.db")


@pytest.fixture
def moevlm(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command in the workplace as `moevlm` would; returns its standard error, fails if it fails."""

    def run(*arguments: str, code: int = 0) -> str:
        actual = main(list(arguments))
        shown, told = capfd.readouterr()
        assert actual == code, f"moevlm {' '.join(arguments)} ended with {actual}, expected {code}:\n{shown}\n{told}"
        return told

    return run


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a report's images be empty, for tests that read its sentences and tables; drawing takes most of their time.

    `tests/study/report` looks at the images.
    """
    from matplotlib.figure import Figure

    def save(self: Figure, file: IO[Any], format: str, **_: object) -> None:
        file.write("<svg><defs></defs></svg>" if format == "svg" else b"")

    monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture
def mortal_server(migrated_database: Path, tmp_path: Path) -> Iterator["MlflowServer"]:
    """A server of the test's own, to be killed."""
    from tests.mlflow_server import MlflowServer

    directory = tmp_path / "server"
    directory.mkdir()
    shutil.copyfile(migrated_database, directory / "mlflow.db")
    server = MlflowServer(directory)
    server.start()
    yield server
    server.stop()
