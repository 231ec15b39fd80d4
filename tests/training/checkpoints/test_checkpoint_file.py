"""An invalid checkpoint is refused in one line, before anything is written; no code in it runs."""

import pickle
import sys
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.checkpoints.checkpoint_file import inspect_checkpoint, refuse_other_model
from lightning_moevlm.training.checkpoints.optimizer_state import refuse_other_state
from lightning_moevlm.training.optim import Lion, MuonAdamW, StableAdamW
from tests.small_model import small_vl_moe
from tests.small_run import BACKBONE, SMALL, budget
from tests.training.small_fit import fit

Moevlm = Callable[..., str]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model after a step."""
    path = tmp_path_factory.mktemp("saved") / "one.ckpt"
    fit(VisionLanguageModule(small_vl_moe()), 1, save_to=path)
    return path


def spoilt(saved: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """Invalid or malicious files, with their messages."""
    whole = saved.read_bytes()
    content = torch.load(saved, weights_only=True)
    mark = folder / "mark"

    def file(name: str, data: bytes) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    def torch_file(name: str, data: object) -> Path:
        torch.save(data, folder / name)
        return folder / name

    (folder / "folder.ckpt").mkdir()
    flipped = bytearray(whole)
    flipped[whole.index(b"data.pkl") + 60] ^= 0xFF
    return {
        "missing": (folder / "none.ckpt", "no checkpoint at "),
        "empty": (file("empty.ckpt", b""), "is empty; give one that `moevlm fit` has saved"),
        "a text": (file("text.ckpt", b"hello world"), "is not a checkpoint, or is truncated"),
        "cut short": (file("cut.ckpt", whole[: len(whole) // 2]), "is not a checkpoint, or is truncated"),
        "damaged": (file("damaged.ckpt", bytes(flipped)), "damaged.ckpt "),
        "a folder": (folder / "folder.ckpt", "is a folder: give a .ckpt file"),
        "a pickle that calls": (
            torch_file("bomb.ckpt", content | {"callbacks": Bomb(mark)}),
            "holds more than tensors, numbers and texts, possibly code that runs when it is read",
        ),
        "a bare pickle that calls": (
            file("pickle.ckpt", pickle.dumps(Bomb(mark))),
            "is not a checkpoint, or is truncated",
        ),
        "a list": (torch_file("list.ckpt", [1, 2]), "has no state_dict, pytorch-lightning_version; give one that"),
        "weights without their frame": (torch_file("weights.ckpt", content["state_dict"]), "has no state_dict"),
    }


KINDS = ("missing", "empty", "a text", "cut short", "damaged", "a folder", "a pickle that calls")
KINDS += ("a bare pickle that calls", "a list", "weights without their frame")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_an_invalid_checkpoint_is_refused_and_never_run(
    subcommand: str, kind: str, saved: Path, tmp_path: Path
) -> None:
    files = spoilt(saved, tmp_path)
    assert files.keys() == set(KINDS)
    path, told = files[kind]
    if kind == "a list" and subcommand == "fit":
        told = "has no state_dict, pytorch-lightning_version, loops, optimizer_states, lr_schedulers"
    with pytest.raises(UserError) as caught:
        inspect_checkpoint(str(path), subcommand, tmp_path)
    assert told in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()


def test_the_bomb_of_these_tests_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_weights_alone_can_be_validated_and_not_gone_on_with(saved: Path, tmp_path: Path) -> None:
    content = torch.load(saved, weights_only=True)
    alone = {name: content[name] for name in ("state_dict", "pytorch-lightning_version", "loops")}
    torch.save(alone, tmp_path / "alone.ckpt")
    assert inspect_checkpoint(f"file://{tmp_path}/alone.ckpt", "validate", tmp_path) is not None
    with pytest.raises(UserError, match="has no optimizer_states, lr_schedulers to resume training"):
        inspect_checkpoint(str(tmp_path / "alone.ckpt"), "fit", tmp_path)


def test_a_checkpoint_that_cannot_be_inspected_is_left_to_lightning(tmp_path: Path) -> None:
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded/meta.pt").touch()
    (tmp_path / "hpc_ckpt_3.ckpt").touch()
    for path in (None, "last", "hpc", "s3://bucket/one.ckpt", str(tmp_path / "sharded")):
        assert inspect_checkpoint(path, "fit", tmp_path) is None


@pytest.mark.parametrize(
    ("word", "subcommand"), [("best", "fit"), ("best", "test"), ("last", "validate"), ("hpc", "fit")]
)
def test_words_that_could_mean_nothing_are_refused(word: str, subcommand: str, tmp_path: Path) -> None:
    # Lightning ends in a traceback for best and hpc, and for last evaluates the untrained model with a warning
    with pytest.raises(UserError, match=rf"ckpt_path is {word}, but .* give a (file|\.ckpt file)"):
        inspect_checkpoint(word, subcommand, tmp_path)


def test_another_model_is_named_by_its_first_tensor(saved: Path) -> None:
    checkpoint = inspect_checkpoint(str(saved), "fit", saved.parent)
    assert checkpoint is not None
    refuse_other_model(checkpoint, str(saved), VisionLanguageModule(small_vl_moe()))
    with pytest.raises(UserError, match=r"experts.*is \(4, 32, 48\) in it, \(2, 32, 48\) here, and \d+ more tensors"):
        wide = VisionLanguageModule(small_vl_moe(num_experts=2)).state_dict()
        kept = {name: wide[name] if "router" in name else value for name, value in checkpoint["state_dict"].items()}
        refuse_other_model({"state_dict": kept}, str(saved), VisionLanguageModule(small_vl_moe(num_experts=2)))
    more = {"state_dict": checkpoint["state_dict"] | {"backbone.extra": torch.zeros(2, 3)}}
    with pytest.raises(UserError, match=r"backbone\.extra is \(2, 3\) in it, missing here; give the configuration of"):
        refuse_other_model(more, str(saved), VisionLanguageModule(small_vl_moe()))


def test_on_the_command_line_nothing_is_written(moevlm: Moevlm, workplace: Path, saved: Path) -> None:
    moevlm("fit", *SMALL, *budget(1))
    (own,) = workplace.glob("runs/**/last.ckpt")
    (config,) = workplace.glob("runs/*/*/config/config.yaml")
    assert (
        "weights_only: true" in config.read_text()
        and "weights_only" not in (config.parent / "changed.yaml").read_text()
    )
    (workplace / "files").mkdir()
    bomb = spoilt(saved, workplace / "files")["a pickle that calls"][0]
    before = sorted(workplace.rglob("*"))
    for arguments, told in (
        (("validate", f"--ckpt_path={bomb}"), "possibly code"),
        (("fit", f"--ckpt_path={bomb}", "--weights_only=false"), "weights_only is false"),
        (("fit", f"--ckpt_path={saved}"), f"the checkpoint {saved} is of another model: "),
        (("predict", f"--ckpt_path={own}", f"{BACKBONE}.dim=32"), f"-c {config}"),
    ):
        (line,) = [
            line for line in moevlm(arguments[0], *SMALL, *arguments[1:], code=2).splitlines() if "error" in line
        ]
        assert told in line
    assert sorted(workplace.rglob("*")) == before  # no mark, no run


class FileServer(ThreadingHTTPServer):
    """Ignores clients that close the connection during an answer, as readers of a bad file do."""

    def handle_error(self, request: object, client_address: object) -> None:
        assert isinstance(sys.exc_info()[1], ConnectionError)


def test_a_checkpoint_of_a_server_is_not_unpickled(
    moevlm: Moevlm, workplace: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # left to itself, Lightning reads what comes by http with weights_only off
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))
    (workplace / "files").mkdir()
    spoilt(saved, workplace / "files")
    handler = partial(SimpleHTTPRequestHandler, directory=str(workplace / "files"))
    with FileServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = moevlm("fit", *SMALL, *budget(1), f"--ckpt_path=http://127.0.0.1:{server.server_port}/bomb.ckpt", code=2)
        server.shutdown()
    assert "moevlm: error: the checkpoint holds more than tensors" in told and "Traceback" not in told
    assert not (workplace / "files/mark").exists()


def test_a_trial_run_leaves_nothing(moevlm: Moevlm, workplace: Path) -> None:
    # Lightning skips every checkpoint of a fast_dev_run but the last one, at the end of training
    before = sorted(workplace.rglob("*"))
    moevlm("fit", *SMALL, "--trainer.fast_dev_run=true")
    assert sorted(workplace.rglob("*")) == before


def test_half_precision_that_would_be_another_is_refused(moevlm: Moevlm) -> None:
    told = moevlm("fit", *SMALL, *budget(1), "--trainer.precision=16-mixed", "--trainer.accelerator=cpu", code=2)
    assert "trainer.precision is 16-mixed, which CPUs do not support; Lightning would compute in bf16-mixed" in told


@pytest.mark.parametrize("optimizer", [AdamW, partial(AdamW, fused=True), StableAdamW, Lion, MuonAdamW])
def test_state_of_another_kind_of_optimiser_is_refused(optimizer: Callable[..., Any], saved: Path) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    if optimizer in (Lion, MuonAdamW):  # Lion would go on with AdamW's mean, MuonAdamW fail at its first step
        with pytest.raises(
            UserError, match=r"its optimiser state is exp_avg, exp_avg_sq, step, that of (Lion|MuonAdamW) is "
        ):
            refuse_other_state(checkpoint, optimizer)
    else:
        refuse_other_state(checkpoint, optimizer)


@pytest.mark.parametrize("optimizer", [Lion, MuonAdamW, SGD, partial(SGD, momentum=0.9)])
def test_state_of_the_same_kind_is_taken(optimizer: Callable[..., Any], tmp_path: Path) -> None:
    build = partial(optimizer, lr=1e-3)
    fit(VisionLanguageModule(small_vl_moe(), optimizer=build), 2, save_to=tmp_path / "own.ckpt")
    refuse_other_state(torch.load(tmp_path / "own.ckpt", weights_only=True), build)
