"""Trainings of a sweep, one after the other in one process, without MLflow: what they take by themselves.

python -m tests.cli.bare_trainings RUN_FOLDER... prints seconds of imports and of all trainings as JSON.
"""

import json
import sys
import time
from pathlib import Path

from lightning_moevlm.common.process_tuning import collect_rarely

if __name__ == "__main__":
    begin = time.perf_counter()
    with collect_rarely():  # as `moevlm fit` imports
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  # a run imports it when it opens its store
        import s3fs  # noqa: F401  # Lightning imports it when a ModelCheckpoint begins

        from lightning_moevlm.cli import training as lightning_cli
        from lightning_moevlm.tracking import RunLogger, RunRecord  # noqa: F401

    imports = time.perf_counter() - begin
    training = 0.0
    for folder in map(Path, sys.argv[1:]):
        files = [
            word
            for file in ("conf/quickstart.yaml", "small.yaml", folder / "overrides.yaml")
            for word in ("-c", str(file))
        ]
        begin = time.perf_counter()
        lightning_cli.run(["fit", *files, "--trainer.logger=false", f"--trainer.default_root_dir=bare/{folder.name}"])
        training += time.perf_counter() - begin
    print(json.dumps({"imports": imports, "training": training}))
