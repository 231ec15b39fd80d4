import shutil
from pathlib import Path

import pytest


@pytest.fixture
def uri(migrated_database: Path, tmp_path: Path) -> str:
    """A store of the test's own."""
    shutil.copyfile(migrated_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"
