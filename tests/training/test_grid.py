"""Every family with every objective: runs, learns a batch by heart, resumes to the bit, trains on ranks as on one."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.objectives import Draws
from lightning_moevlm.training.unused_parameters import parts_without_gradient
from tests.training.grid import CASES, FAMILIES, GRID, OBJECTIVES, PAIRS, REFUSED, TEXTS, Case, build, weights_after
from tests.training.small_fit import fit

# every family and every objective; the first four have every family. The others are slow, by their number
DIAGONAL = (
    ("VLMoE", "MaskedModelling"),
    ("LIMoE", "Contrastive"),
    ("MoMa", "Joint"),
    ("MoEDecoder", "NextToken"),
    ("VLMoE", "AnswerClassification"),
    ("MoMa", "Classification"),
    ("LIMoE", "VisualReasoning"),
    ("MoEDecoder", "Contrastive by sigmoid"),
    ("VLMoE", "Matching"),
)
EXTREMES = ("LIMoE, texts alone", "MoEDecoder, texts alone", "a term without a weight", "a modality for each rank")
EXTREMES += ("contrast and masks of mixed batches",)


def combinations(fast: tuple[tuple[str, str], ...]) -> pytest.MarkDecorator:
    """Run on the whole grid, all but some of it slow."""
    slow = pytest.mark.slow(reason="a combination beside those of the diagonal")
    cells = [pytest.param(*cell, id=", ".join(cell), marks=() if cell in fast else slow) for cell in GRID]
    return pytest.mark.parametrize(("family", "name"), cells)


def test_the_diagonal_names_everything_once() -> None:
    assert {family for family, _ in DIAGONAL} == FAMILIES.keys()
    assert sorted(name for _, name in DIAGONAL) == sorted(OBJECTIVES)


@pytest.mark.parametrize(("cell", "told"), REFUSED.items(), ids=lambda each: ", ".join(each))
def test_a_combination_that_makes_no_sense_is_refused(cell: tuple[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        build(cell[0], OBJECTIVES[cell[1]].objective)


@combinations(DIAGONAL)
def test_fast_dev_run(family: str, name: str) -> None:
    trained = OBJECTIVES[name]
    trainer = Trainer(
        accelerator="cpu", fast_dev_run=True, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    train, val = (DataLoader(batches, batch_size=None) for batches in (trained.batches, [PAIRS]))  # type: ignore[arg-type]
    trainer.fit(build(family, trained.objective), train, val)
    assert trainer.global_step == 1 and torch.isfinite(trainer.callback_metrics["val/task_loss"])


@combinations((("LIMoE", "Contrastive"), ("MoEDecoder", "NextToken"), ("VLMoE", "AnswerClassification")))
def test_one_batch_is_learnt_by_heart(family: str, name: str) -> None:
    trained = OBJECTIVES[name]
    module = build(family, trained.objective).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    batch = PAIRS.first(4)
    seen: list[dict[str, float]] = []
    for _ in range(100):
        terms = module.objective(module.backbone, batch, Draws(0)).terms  # the same masks every time
        optimizer.zero_grad()
        torch.stack([term.raw for term in terms.values()]).sum().backward()
        optimizer.step()
        seen.append({term: float(value.raw.detach()) for term, value in terms.items()})
    left = {term: value / seen[0][term] for term, value in seen[-1].items()}
    assert left.keys() == trained.left.keys()
    assert {term: share for term, share in left.items() if share > trained.left[term]} == {}


@combinations(DIAGONAL[:4])
def test_resumed_equals_uninterrupted_to_the_bit(family: str, name: str, tmp_path: Path) -> None:
    trained = OBJECTIVES[name]
    whole, again = (build(family, trained.objective) for _ in range(2))
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(whole, 4, batches=trained.batches[:2], callbacks=[saver])
    half = tmp_path / "step=2.ckpt"
    resumed = fit(again, 4, batches=trained.batches[:2], resume_from=half)
    assert len(resumed.outputs) == 2
    before = torch.load(half, weights_only=True)["state_dict"]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert any(not torch.equal(value, before[key]) for key, value in whole.state_dict().items())


def marked(case: str) -> object:
    fast = case in (*EXTREMES, *(", ".join(cell) for cell in DIAGONAL[:4]))
    return pytest.param(case, marks=() if fast else pytest.mark.slow(reason="as those of the diagonal"))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_batch_that_does_not_reach_every_parameter_trains_under_ddp(case: str) -> None:
    # DDP with one rank, too, refuses a second step while parameters of the first wait for a gradient
    ddp, plain = (after(CASES[case], 3, strategy=strategy) for strategy in ("ddp", "auto"))
    before = after(CASES[case], 0)
    for name, value in plain.items():
        assert torch.equal(ddp[name], value), name
    assert any(not torch.equal(before[name], value) for name, value in plain.items())


def after(case: Case, steps: int, **options: object) -> dict[str, Tensor]:
    return weights_after(case, case.batches, steps, **options)


@pytest.mark.slow(reason="two processes import Lightning and train the whole grid")
def test_two_ranks_train_as_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    found = tmp_path / "two.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.training.grid", str(found)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(found, weights_only=True)
    for name, case in CASES.items():
        before, one = after(case, 0), after(case, 3)
        assert any(not torch.equal(two[name][key], value) for key, value in before.items())
        for key, value in one.items() if case.adds_up else ():
            moved = (value - before[key]).norm()
            assert float((two[name][key] - value).norm()) <= 1e-3 * float(moved), f"{name}: {key}"


PAIRS_ONLY = [name for name, trained in OBJECTIVES.items() if all(batch is PAIRS for batch in trained.batches)]


@pytest.mark.parametrize("name", PAIRS_ONLY)
def test_batches_that_an_objective_cannot_use_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"this batch has none: choose a set"):
        fit(build("VLMoE", OBJECTIVES[name].objective), 1, batches=[TEXTS])


def test_the_parts_without_a_gradient_are_named(caplog: pytest.LogCaptureFixture) -> None:
    texts = CASES["VLMoE, texts alone"]
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        after(texts, 2)
    (line,) = [record.getMessage() for record in caplog.records if "no gradient" in record.getMessage()]
    parts = line.partition(": ")[2].split(", ")
    assert {"backbone.patches", "objective.image_head"} <= set(parts) and "objective.text_head" not in parts
    caplog.clear()
    weights_after(texts, [PAIRS], 1)
    assert "no gradient" not in caplog.text


def test_the_largest_parts_by_hand() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Sequential(torch.nn.Linear(2, 2))})
    module["a"].weight.grad = torch.zeros(2, 2)
    assert parts_without_gradient(module) == ["b", "a.bias"]
    module["b"].requires_grad_(False)
    assert parts_without_gradient(module) == ["a.bias"]
