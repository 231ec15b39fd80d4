"""Roles of experts while training: by hand, on a planted specialist, and without a trace in the run."""

import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_moevlm.atlas.labels.label import LABELS, Values
from lightning_moevlm.atlas.labels.label_tokens import TokenLabels
from lightning_moevlm.atlas.labels.scene_objects import GROUND
from lightning_moevlm.atlas.live import ExpertRoles
from lightning_moevlm.atlas.live.role_counts import RoleCounter
from lightning_moevlm.atlas.probe.probe_set import ProbeSet
from lightning_moevlm.atlas.routing.route import LayerChoices
from lightning_moevlm.cli.main import main
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.write.demo.scenes import build_scenes
from lightning_moevlm.model.routers import Router, TopKRouter
from lightning_moevlm.training import VisionLanguageModule
from tests.atlas.observed import NUM_EXPERTS, PlantedRouter, open_data, small_model, tokens_of
from tests.small_run import budget
from tests.training.callbacks.test_precision_shadow import Points, Recorder

STEPS, EVERY = 48, 6
"""Of a training that is timed, and between its points."""


def test_metrics_by_hand() -> None:
    # two samples of two patches; expert 0 has both apples and a ground, expert 1 a dog
    values = {label.name: Values() for label in LABELS}
    codes = [values["image/category"].codes([*row]) for row in ((GROUND, "apple"), ("apple", "dog"))]
    code_BS = {label.name: np.full((2, 2), -1, np.int32) for label in LABELS}
    code_BS["image/category"] = np.array(codes, np.int32)
    code_BS["modality"] = np.array([values["modality"].codes(["image", "image"])] * 2, np.int32)
    labels = TokenLabels(np.ones((2, 2), np.bool_), np.zeros(2, np.int32), code_BS, {}, (None, None))
    chosen_BSE = torch.tensor([[[1.0, 0, 0], [1, 0, 0]], [[1, 0, 0], [0, 1, 0]]])
    counter = RoleCounter(values)
    counter.add([LayerChoices("blocks.3.ffn", 3, torch.ones(2, 2).bool(), *[chosen_BSE] * 3)], labels)
    found = counter.metrics()
    # I = H(E) as the category decides the expert: H(1/4) = 0.562; H(category) is larger; chance: half of the shifts
    assert found["expert_nmi/block3/image/category"] == pytest.approx(1.0)
    assert 0 < found["expert_nmi_by_chance/block3/image/category"] < 1
    assert found["expert_top_category/block3/image/expert0"] == 1  # the ground does not count
    assert found["expert_top_category/block3/image/expert1"] == 1
    assert found["expert_top_category_base/block3/image"] == pytest.approx(2 / 3)
    assert len(found) == 5, "one modality alone tells nothing, and expert 2 has no token"
    assert all(metric_keys.find_metric(key) is not None for key in found)


def train(
    root: Path,
    callback: Callback | None,
    router: Callable[[int, int], Router] = TopKRouter,
    steps: int = 5,
    precision: Any = "32-true",
) -> tuple[Points, dict[str, Tensor]]:
    module, logger = VisionLanguageModule(small_model(router), init_std=0.2), Recorder()
    Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[callback] if callback else [], logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        precision=precision,
    ).fit(module, datamodule=open_data(root))  # fmt: skip
    return logger.points, module.state_dict()


def test_a_planted_specialist_is_seen_and_training_left_alone(many_scenes: Path) -> None:
    router = partial(PlantedRouter, planted=tokens_of(open_data(many_scenes), "fruit"))
    points, trained = train(many_scenes, ExpertRoles(every_n_steps=2, num_samples=30), router)
    roles = {step: {k: v for k, v in point.items() if k.startswith("expert_")} for step, point in points.items()}
    assert [step for step, found in roles.items() if found] == [0, 2, 4, 5]
    assert roles[0] == roles[2] == roles[5], "the rule does not learn"
    found = roles[0]
    blocks = {key.split("/")[1].removeprefix("block") for key in found if key.startswith("expert_nmi/")}
    assert blocks
    for block in blocks:
        assert found[f"expert_top_category/block{block}/text/expert0"] > 0.8
        assert found[f"expert_top_category_base/block{block}/text"] < 0.5
        more = (
            found[f"expert_nmi/block{block}/text/category"] - found[f"expert_nmi_by_chance/block{block}/text/category"]
        )
        assert more > 0.05
        assert math.isclose(found[f"expert_nmi/block{block}/both/modality"], found["expert_nmi/block1/both/modality"])
    experts = {key for key in found if key.startswith("expert_top_category/block1/image")}
    assert len(experts) == NUM_EXPERTS - 1, "expert 0 has no patch"
    _, untouched = train(many_scenes, None, router)
    assert all(torch.equal(trained[name], untouched[name]) for name in untouched)


def test_the_untrained_model_and_the_last_step_are_points(many_scenes: Path) -> None:
    callback = ExpertRoles(every_n_steps=100, num_samples=8)
    points, _ = train(many_scenes, callback, steps=1, precision="bf16-true")
    assert {step for step, point in points.items() if any(key.startswith("expert_nmi/") for key in point)} == {0, 1}


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"num_samples": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="of ExpertRoles is 0"):
        ExpertRoles(**options)


@pytest.mark.slow(reason="times trainings")
@pytest.mark.parametrize("config", ["conf/quickstart.yaml", "conf/healthy.yaml"])
def test_a_point_costs_less_than_two_per_cent_of_a_hundred_steps(
    config: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By CPU time, which other programs do not change; points and steps take turns. -s prints the figure."""
    points, ends = list[float](), list[float]()
    measure = ExpertRoles._measure

    def timed(*arguments: Any) -> None:
        begin = time.process_time()
        measure(*arguments)
        ends.append(time.process_time())
        points.append(ends[-1] - begin)

    monkeypatch.setattr(ExpertRoles, "_measure", timed)
    shards = Path("data/shards/scenes")
    shards.unlink()
    build_scenes(shards, 1000, 64, "jpg", 16, seed=3, samples_per_shard=50, vocab_size=640, force=False)
    assert ProbeSet(ShardDataModule(str(shards), 32, 64, 24, 640), "val", 1000).num_samples >= 64
    roles = {"class_path": "lightning_moevlm.atlas.live.ExpertRoles", "init_args": {"every_n_steps": EVERY}}
    Path("roles.yaml").write_text(json.dumps({"trainer": {"callbacks+": [roles]}}))
    alone = ("--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0")
    assert main(["fit", "-c", config, "-c", "roles.yaml", *budget(STEPS), *alone]) == 0
    assert len(points) == 1 + STEPS // EVERY
    step = (ends[-1] - ends[0] - sum(points[1:])) / STEPS
    cost = statistics.median(points) / (100 * step)
    print(f"\n{config}: a point {1000 * statistics.median(points):.0f} ms, a step {1000 * step:.1f} ms: {cost:.2%}")
    assert cost < 0.02
