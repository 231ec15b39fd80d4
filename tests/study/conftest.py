import shutil
from pathlib import Path

import pytest

from lightning_moevlm.tracking.store import prepare_store


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow; making one takes seconds, copying it milliseconds."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    prepare_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(migrated_database: Path, tmp_path: Path) -> str:
    """A store of the test's own."""
    shutil.copyfile(migrated_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"
