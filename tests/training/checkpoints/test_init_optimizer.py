"""Training that starts with the optimiser's state of another run: of a like model, and of a dense one as experts."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.objectives import Contrastive
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.checkpoints.init_from import InitFrom, Upcycle
from lightning_moevlm.training.optim import Hyperball, Lion, MuonAdamW
from tests.small_model import pair_batch
from tests.training.checkpoints.test_init_from import limoe

WITHOUT_GRADIENT = {"backbone.patches.mask_D"}
State = dict[str, dict[str, Any]]


class StateAtStart(Callback):
    """Keeps the optimiser's state before the first step, by name."""

    def __init__(self) -> None:
        self.found: State = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = state_by_name(trainer, pl_module)


def state_by_name(trainer: Trainer, module: LightningModule) -> State:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {names[p]: deepcopy(state) for p, state in trainer.optimizers[0].state.items() if state}


def fitted(module: VisionLanguageModule, steps: int, first_seed: int = 0, *callbacks: Callback) -> Trainer:
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    batches = [pair_batch(seed=first_seed + step) for step in range(steps)]
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer


def module_of(num_experts: int, optimizer: Callable[..., Optimizer] = AdamW, **options: Any) -> VisionLanguageModule:
    is_sparse = options.pop("is_sparse", True)
    backbone = limoe(num_experts, is_sparse=is_sparse)
    return VisionLanguageModule(backbone, Contrastive, optimizer=optimizer, init_std=0.1, **options)


def saved(module: VisionLanguageModule, path: Path) -> tuple[str, State]:
    trainer = fitted(module, 2)
    trainer.save_checkpoint(path / "other.ckpt")
    return str(path / "other.ckpt"), state_by_name(trainer, module)


def test_a_like_model_goes_on_as_if_it_were_not_interrupted(tmp_path: Path) -> None:
    path, _ = saved(module_of(4), tmp_path)
    whole, rest, without = (
        module_of(4),
        *(module_of(4, init_from=InitFrom(path, optimizer_state=state)) for state in (True, None)),
    )
    fitted(whole, 4)
    fitted(rest, 2, 2)
    fitted(without, 2, 2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    assert not torch.equal(whole.state_dict()["backbone.norm.weight"], without.state_dict()["backbone.norm.weight"])


@pytest.mark.parametrize(
    ("is_twin", "optimizer"),
    [
        pytest.param(True, AdamW, id="AdamW"),
        pytest.param(True, partial(MuonAdamW, neuron_beta=0.95), id="NorMuon"),
        pytest.param(True, partial(Hyperball, base="adam"), id="Hyperball"),
        pytest.param(False, partial(Hyperball, base="adam"), id="an only expert"),
    ],
)
def test_each_expert_has_the_moments_of_its_dense_matrix(
    is_twin: bool, optimizer: Callable[..., Optimizer], tmp_path: Path
) -> None:
    dense = module_of(4, optimizer, is_sparse=False) if is_twin else module_of(1, optimizer)
    path, there = saved(dense, tmp_path)
    start = StateAtStart()
    width = dense.backbone.blocks[1].ffn.up.out_features if is_twin else 48  # type: ignore[union-attr]
    options = InitFrom(path, upcycle=Upcycle(), optimizer_state=True)
    module = VisionLanguageModule(
        limoe(4, hidden_dim=width), Contrastive, optimizer=optimizer, init_std=0.1, init_from=options
    )
    trainer = fitted(module, 1, 0, start)
    found = start.found
    routers = {name for name, _ in module.named_parameters() if ".router." in name}
    assert routers and found.keys() == {name for name, _ in module.named_parameters()} - routers - WITHOUT_GRADIENT
    for layer in ("backbone.blocks.1.ffn", "backbone.blocks.3.ffn"):
        for stack, matrix in (("up_EDF", "up"), ("down_EFD", "down")):
            own = found[f"{layer}.experts.{stack}"]
            other = there[f"{layer}.{matrix}.weight" if is_twin else f"{layer}.experts.{stack}"]
            assert own.keys() == other.keys()
            for part, value in own.items():
                expected = other[part]
                if part != "step":
                    assert len(value) == 4
                    expected = (expected.mT if expected.ndim else expected) if is_twin else expected[0]
                    expected = expected.expand(4, *expected.shape)
                assert torch.equal(value, expected), (stack, part)
    for name, value in found["backbone.text.token.weight"].items():
        assert torch.equal(value, there["backbone.text.token.weight"][name])
    assert routers < state_by_name(trainer, module).keys()  # they begin with the first step


def test_it_says_what_was_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = saved(module_of(1), tmp_path)
    module = module_of(4, init_from=InitFrom(path, upcycle=Upcycle(noise=0.1), optimizer_state=True))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fitted(module, 1)
    taken = sum(1 for name, _ in module.named_parameters() if ".experts." not in name and ".router." not in name)
    line = f"optimiser state from {path}: {taken - 1} tensors as they were, 4 copied for experts, 3 anew"
    assert line in caplog.text


@pytest.mark.parametrize("optimizer", [Lion, partial(SGD, lr=0.1)], ids=["Lion", "SGD"])
def test_another_optimiser_is_refused(optimizer: Callable[..., Optimizer], tmp_path: Path) -> None:
    path, _ = saved(module_of(1), tmp_path)
    module = module_of(4, optimizer, init_from=InitFrom(path, upcycle=Upcycle(), optimizer_state=True))
    kept = "exp_avg" if optimizer is Lion else "(momentum_buffer|nothing)"
    with pytest.raises(
        UserError, match=rf"keeps exp_avg, exp_avg_sq, step, where \w+ keeps {kept} .*optimiser of that"
    ):
        fitted(module, 1)


def test_a_checkpoint_without_named_state_is_refused(tmp_path: Path) -> None:
    path, _ = saved(module_of(1), tmp_path)
    content = torch.load(path, weights_only=True)
    for key, match in (("optimizer_names", "resume its run for one step"), ("optimizer_states", "has no state of an")):
        del content[key]
        torch.save(content, path)
        with pytest.raises(UserError, match=match):
            fitted(module_of(4, init_from=InitFrom(path, upcycle=Upcycle(), optimizer_state=True)), 1)
    with pytest.raises(UserError, match=r"upcycle.reinitialised lets units start anew.*set one of the two"):
        InitFrom(path, upcycle=Upcycle(reinitialised=0.5), optimizer_state=True)
