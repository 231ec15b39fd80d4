"""A training that takes no time but behaves like one: logs to MLflow, checkpoints, resumes, crashes, diverges.

Run as: python tiny_training.py BASE OVERRIDES RUN_ID [CHECKPOINT]
It writes into MLflow's tables itself: importing MLflow would take most of the time of a test. Where the study's store
is a server, TINY_STORE names the server's database. With TINY_QUICK it does not wait after a step.
"""

import math
import os
import sqlite3
import sys
import time
import zipfile
from pathlib import Path

import yaml
from omegaconf import OmegaConf

EXPERTS = 4


def main(base: str, overrides: str, run_id: str, checkpoint: str | None = None) -> None:
    config = OmegaConf.to_container(OmegaConf.merge(*(yaml.safe_load(Path(f).read_text()) for f in (base, overrides))))
    model, seed = config["model"], config["seed_everything"]
    uri = os.environ.get("TINY_STORE", os.environ["MLFLOW_TRACKING_URI"])
    store = sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=60)
    folder = Path(config["trainer"]["default_root_dir"])
    first = 0
    if checkpoint:
        with zipfile.ZipFile(checkpoint) as archive:
            first = int(archive.read("step")) + 1
    print(f"training from step {first} with {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    for step in range(first, config["trainer"]["max_steps"] + 1):
        rows = [
            (key, 0.0 if math.isnan(value) else value, math.isnan(value), int(time.time() * 1000), run_id, step)
            for key, value in points(step, seed, model).items()
            if step % model["validate_every"] == 0
        ]
        with store:
            for table in ("INSERT INTO metrics", "INSERT OR REPLACE INTO latest_metrics"):  # a server looks in both
                columns = "(key, value, is_nan, timestamp, run_uuid, step)"
                store.executemany(f"{table} {columns} VALUES (?, ?, ?, ?, ?, ?)", rows)
        if model["checkpoints"]:
            keep(folder / "checkpoints" / "last.ckpt", step)
        if step in model.get("stop_at", ()) and first <= step:
            sys.exit(128 + 15)  # as `moevlm fit` leaves when it is asked to end, and has saved
        if step == model["crash_at"]:
            raise RuntimeError("the tiny training was told to crash")
        if "TINY_QUICK" not in os.environ:
            time.sleep(model["seconds_per_step"])
    store.close()


def points(step: int, seed: int, model: dict) -> dict[str, float]:
    loss = 4.0 + 3.0 * math.exp(-model["speed"] * step) + 0.3 * seed + 0.01 * math.sin(7 * seed + 11 * model["speed"])
    loss += model["worse"] if step > 0 else 0.0
    if model["nan_at"] is not None and step >= model["nan_at"]:
        loss = math.nan
    values = {
        "val/task_loss": loss,
        "val/accuracy_text": 0.5 - 0.4 * math.exp(-model["speed"] * step) + 0.01 * seed,
        "val/majority_text": 0.14,
        "throughput/samples_per_second": 100.0 + 5 * seed + 20 * model["speed"],
    }
    for block in (1, 3):
        for modality in ("image", "text"):
            weights = [math.exp(model["skew"] * step * math.sin(1 + expert + block)) for expert in range(EXPERTS)]
            for expert, weight in enumerate(weights):
                values[f"load/block{block}/{modality}/expert{expert}"] = weight / sum(weights)
    return values


def keep(file: Path, step: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".new")
    with zipfile.ZipFile(beside, "w") as archive:
        archive.writestr("step", str(step))
    beside.replace(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
