"""From scenes to statements about two images and a model that judges them, as a user does it."""

from collections.abc import Callable
from pathlib import Path

CONVERT = ["data", "convert", "statements", "data/shards/scenes", "--licence", "CC BY-SA 4.0"]
TASK = ["-c", "conf/quickstart.yaml", "-c", "conf/tasks/nlvr2.yaml"]
SMALL = [
    "--data.batch_size=4", "--data.image_size=32", "--model.backbone.init_args.dim=16",
    "--model.backbone.init_args.num_heads=2", "--model.backbone.init_args.hidden_dim=32",
]  # fmt: skip


def test_statements_are_made_and_judged(moevlm: Callable[..., str], workplace: Path) -> None:
    moevlm(*CONVERT, "--out", "data/shards/scenes-statements")
    moevlm("fit", *TASK, *SMALL, "--trainer.fast_dev_run=true")
    single = moevlm("fit", *TASK, *SMALL, "--trainer.fast_dev_run=true", "--data.second_image=null", code=2)
    assert "set data.second_image to right" in single
    single = moevlm("fit", *TASK, *SMALL, "--trainer.fast_dev_run=true", "--data.root=data/shards/scenes", code=2)
    assert "convert statements" in single
