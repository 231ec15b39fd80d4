"""A cluster of one machine that answers to SLURM's commands, as far as submitit uses them.

`install` puts sbatch, srun, sacct, scancel and scontrol into a folder; each is this file under another name. A job is a
folder with its script, its state and the group of its processes; a keeper of its own runs it, and runs it again when it
was requeued.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LIMIT = "FAKE_SLURM_LIMIT"
_OVER = ("COMPLETED", "FAILED", "CANCELLED")


def install(folder: Path) -> Path:
    """Make the commands; return the folder for PATH."""
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        file = folder / "bin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__)} {folder} {name} "$@"\n')
        file.chmod(0o755)
    return folder / "bin"


def main(home: str, name: str, *words: str) -> int:
    jobs = Path(home) / "jobs"
    jobs.mkdir(exist_ok=True)
    if name == "sbatch":
        return sbatch(jobs, home, Path(words[-1]))
    if name == "keep":
        keep(jobs / words[0])
    elif name == "srun":
        srun(list(words))
    elif name == "sacct":
        print("JobID|State|NodeList")
        wanted = [words[i + 1] for i, word in enumerate(words) if word == "-j"]
        for job in wanted:
            if (jobs / job).exists():
                print(f"{job}|{(jobs / job / 'state').read_text()}|here")
    elif name == "scancel":
        stop(jobs / words[0], "CANCELLED")
    elif name == "scontrol":
        stop(jobs / words[1], "REQUEUED")
    return 0


def sbatch(jobs: Path, home: str, script: Path) -> int:
    there = [job for job in jobs.iterdir() if (job / "state").read_text() not in _OVER]
    if len(there) >= int(os.environ.get(LIMIT, "99")):
        jobs.with_name("refused").write_text(script.read_text())
        print("sbatch: error: QOSMaxSubmitJobPerUserLimit", file=sys.stderr)
        return 1
    number = str(1 + len(list(jobs.iterdir())))
    job = jobs / number
    job.mkdir()
    (job / "state").write_text("PENDING")
    (job / "script").write_text(script.read_text())
    quiet = subprocess.DEVNULL
    keeper = [sys.executable, "-S", __file__, home, "keep", number]
    subprocess.Popen(keeper, start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
    print(f"Submitted batch job {number}")
    return 0


def keep(job: Path) -> None:
    """Run a job to its end, again and again where it is requeued."""
    env = os.environ | {
        "SLURM_JOB_ID": job.name,
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_JOB_NODELIST": "here",
    }
    while True:
        (job / "state").write_text("RUNNING")
        process = subprocess.Popen(["bash", str(job / "script")], env=env, start_new_session=True)
        (job / "group").write_text(str(process.pid))
        code = process.wait()
        state = (job / "state").read_text()
        if state != "REQUEUED":
            break
        time.sleep(0.5)
    if state == "RUNNING":
        (job / "state").write_text("FAILED" if code else "COMPLETED")


def srun(words: list[str]) -> None:
    """Become the command, its output in the file that was asked for."""
    output = words[words.index("--output") + 1].replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    start = next(place for place, word in enumerate(words) if Path(word).name.startswith("python"))
    os.execv(words[start], words[start:])


def stop(job: Path, state: str) -> None:
    """Ask all processes of a job to end; those that SLURM would kill in the end end by themselves here."""
    if (job / "state").read_text() in _OVER:
        return
    (job / "state").write_text(state)
    os.killpg(int((job / "group").read_text()), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
