"""Every shipped task trains a model over the configuration that it names, and judges runs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_moevlm.cli.main import main
from lightning_moevlm.contracts.answer_list import write_answers
from lightning_moevlm.data.count_answers import count_answers
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.annotations import Annotation
from tests.conftest import PROJECT
from tests.small_run import SMALL, budget

TASKS = sorted(path.stem for path in (PROJECT / "conf/tasks").glob("*.yaml"))
OF_OTHER_TESTS = ["multitask", "nlvr2", "vqa", "vqa_as_text"]  # they make their sets
MADE = {"nlvr2": "statements", "vqa": "questions", "vqa_as_text": "questions"}  # what their sets are converted to
TINY = [
    "--data.batch_size=4", "--data.image_size=32", "--model.backbone.init_args.dim=16",
    "--model.backbone.init_args.num_heads=2", "--model.backbone.init_args.hidden_dim=32",
]  # fmt: skip
OF_GROUNDS = "--data.annotation=ground"  # scenes stand for emojis, and colours of grounds for their groups


@pytest.fixture
def furnished(workplace: Path, scenes_root: Path) -> Path:
    """The workplace, with a set of classes."""
    openmoji = shutil.copytree(scenes_root, workplace / "data/shards/openmoji")
    classes, _ = count_answers(ShardStorage(str(openmoji)), None, Annotation("ground"))
    write_answers(classes, openmoji / "answers.json")
    return workplace


def metrics(*command: str, capfd: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Test, and return how many numbers a metric has in the printed table: its own, and that without a model."""
    assert main(["test", *command]) == 0
    rows = re.findall(r"^ +(test/\S+)((?: +-?\d[\d.e+-]*)+)", capfd.readouterr().out, re.M)
    return {key: len(numbers.split()) for key, numbers in rows}


@pytest.mark.parametrize("task", [task for task in TASKS if task not in OF_OTHER_TESTS])
def test_a_task_trains_over_the_file_that_it_names(task: str, moevlm: Callable[..., str], furnished: Path) -> None:
    text = (PROJECT / f"conf/tasks/{task}.yaml").read_text(encoding="utf-8")
    (base,) = re.findall(rf"moevlm fit -c (\S+) -c conf/tasks/{task}\.yaml", text)
    of_classes = [OF_GROUNDS] if "openmoji" in text else []
    moevlm("fit", "-c", base, "-c", f"conf/tasks/{task}.yaml", *TINY, "--trainer.fast_dev_run=true", *of_classes)


def test_the_others_have_tests_of_their_own() -> None:
    files = ("test_multitask.py", "test_nlvr2_task.py", "test_vqa_task.py")
    texts = [(PROJECT / "tests/cli" / file).read_text(encoding="utf-8") for file in files]
    assert all(any(f"conf/tasks/{task}.yaml" in text for text in texts) for task in OF_OTHER_TESTS)
    assert set(OF_OTHER_TESTS) < set(TASKS)


def test_a_run_is_judged_by_its_own_task_and_by_others(
    moevlm: Callable[..., str], furnished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = [*SMALL, "-c", "conf/tasks/captioning.yaml", "--trainer.limit_test_batches=2"]
    moevlm("fit", *own, *budget(1))
    (checkpoint,) = furnished.glob("runs/*/*/checkpoints/last.ckpt")
    by_run = f"--run={checkpoint.parents[1]}"
    assert "test/perplexity/caption" in metrics(*own, f"--ckpt_path={checkpoint}", capfd=capfd)
    language = metrics(by_run, "-c", "conf/tasks/perplexity.yaml", capfd=capfd)
    assert language["test/perplexity/text"] == 2  # with that of the most frequent words
    probes = metrics(by_run, "-c", "conf/tasks/linear_probe.yaml", OF_GROUNDS, capfd=capfd)
    assert probes.keys() >= {"test/linear_probe/top1", "test/knn/top1", "test/probe_baseline/majority"}
    refused = moevlm("test", by_run, "-c", "conf/tasks/contrastive.yaml", code=2)
    assert "is of another model: objective.image_projection.weight is missing in it" in refused


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("joint", "multitask")])  # of the others' parts
def test_metrics_do_not_depend_on_processes_and_batch_size(
    task: str, moevlm: Callable[..., str], furnished: Path
) -> None:
    if task in MADE:
        scenes, made = "data/shards/scenes", f"data/shards/scenes-{MADE[task]}"
        moevlm("data", "convert", MADE[task], scenes, "--licence", "CC0", "--out", made)
    if task == "vqa":
        moevlm("data", "answers", made)
    text = (PROJECT / f"conf/tasks/{task}.yaml").read_text(encoding="utf-8")
    of_classes = [OF_GROUNDS] if "openmoji" in text else []
    base = re.findall(rf"moevlm fit -c (\S+) -c conf/tasks/{task}\.yaml", text)[0]
    options = ["test", "-c", base, "-c", f"conf/tasks/{task}.yaml", *TINY, *of_classes, "--trainer.accelerator=cpu"]
    tables = []
    for ranks, batch_size in ((1, 4), (2, 7)):
        command = [sys.executable, "-m", "lightning_moevlm", *options, f"--trainer.devices={ranks}"]
        command += [f"--data.batch_size={batch_size}"]
        command += ["--trainer.strategy=ddp"] if ranks > 1 else []
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        done = subprocess.run(command, cwd=furnished, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        found = re.findall(r"^ +(test\S*/\S+) +(\S+)", done.stdout, re.M)
        tables.append({key: float(value) for key, value in found})
    assert tables[0].keys() == tables[1].keys() and len(tables[0]) > 3
    assert tables[1] == pytest.approx(tables[0], rel=1e-3, abs=2e-4)  # as printed
