"""Lightning's refusals are one line, for any class of error and any depth of wrapping by the parser."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.parsers import user_errors
from tests.small_run import SMALL, budget

Moevlm = Callable[..., str]


def callback(name: str, **options: object) -> tuple[str, ...]:
    return (f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in options.items()))


BEFORE_THE_RUN = {
    "fsdp on a CPU": (("--trainer.strategy=fsdp", "--trainer.accelerator=cpu"), "The strategy `fsdp` requires a GPU"),
    "a strategy by its class": (("--trainer.strategy=FSDPStrategy",), "The strategy `fsdp` requires a GPU"),
    "no such strategy": (("--trainer.strategy=dpp",), "invalid strategy name: `strategy='dpp'`"),
    "a strategy by its class that needs more": (
        ("--trainer.strategy=ModelParallelStrategy",),
        "model.gradient is set and ModelParallelStrategy shards gradients",
    ),
    "no such accelerator": (("--trainer.accelerator=gpuu",), "accelerator='gpuu'`. Available names are"),
    "fewer devices than none": (("--trainer.devices=-3",), "`devices` selected with `CPUAccelerator` should be an int"),
    "no nodes": (("--trainer.num_nodes=0",), "`num_nodes` must be a positive integer, but got 0"),
    "barebones with a logger": (("--trainer.barebones=true",), "Trainer(barebones=True, logger="),
    "no micro-batches": (("--trainer.accumulate_grad_batches=0",), "trainer.accumulate_grad_batches is 0: choose 1 or"),
    "TensorBoard without its package": (
        ("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs"),
        "error: TensorBoardLogger: Neither `tensorboard` nor `tensorboardX` is available",
    ),
    "a list of loggers without their packages": (
        ("--trainer.logger=[{class_path: TensorBoardLogger, init_args: {save_dir: runs}}]",),
        "error: TensorBoardLogger: Neither `tensorboard` nor `tensorboardX` is available",
    ),
    "an option that a callback refuses": (
        callback("ModelCheckpoint", save_top_k=-3),
        "error: ModelCheckpoint: Invalid value for save_top_k=-3. Must be >= -1",
    ),
    "averaging over epochs in a run of steps": (
        callback("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1),
        "StochasticWeightAveraging counts epochs, and trainer.max_epochs is -1: set trainer.max_epochs to a number",
    ),
    "averaging without the epoch that it begins with": (
        callback("StochasticWeightAveraging", swa_lrs=0.01),
        "StochasticWeightAveraging counts epochs, and trainer.max_epochs is -1: set trainer.max_epochs to a number",
    ),
    "a finder of rates": (
        callback("LearningRateFinder"),
        "remove the callback; a study with design: lr_sensitivity finds",
    ),
    "a clock that cannot be read": (callback("Timer", duration="soon"), "`Timer(duration='soon')` is not a valid"),
}


TWICE = (
    "a strategy by its class",
    "a list of loggers without their packages",
    "averaging without the epoch that it begins with",
)


@pytest.mark.parametrize(
    "mistake",  # a second way to the same refusal is slow
    [pytest.param(each, marks=pytest.mark.slow) if each in TWICE else each for each in BEFORE_THE_RUN],
)
def test_a_refusal_by_lightning_is_one_line_and_leaves_nothing(mistake: str, moevlm: Moevlm, workplace: Path) -> None:
    words, expected = BEFORE_THE_RUN[mistake]
    before = sorted(workplace.rglob("*"))
    lines = [
        line for line in moevlm("fit", *SMALL, *budget(2), *words, code=2).splitlines() if line.startswith("moevlm:")
    ]
    assert len(lines) == 1 and expected in lines[0]
    assert sorted(workplace.rglob("*")) == before


def test_a_part_of_the_users_own_that_fails_keeps_its_traceback() -> None:
    class Broken:
        def __init__(self) -> None:
            raise KeyError("a bug")

    with pytest.raises(KeyError), user_errors():
        Broken()


def test_a_failure_of_lightning_keeps_its_traceback_and_a_refusal_does_not() -> None:
    with pytest.raises(TypeError), user_errors():
        Trainer(logger=False, limit_train_batches="all")  # type: ignore[arg-type]  # compared with 0
    with pytest.raises(UserError, match=r"^The strategy `fsdp` requires a GPU"), user_errors():
        Trainer(logger=False, strategy="fsdp", accelerator="cpu")
