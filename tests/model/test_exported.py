"""An exported model: the same features in plain PyTorch, read back by training, and never more than data."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import simplejpeg
import torch
from safetensors.torch import load_file, save_file

from lightning_moevlm.cli.main import main
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.resolver import build_data, load_module, load_run
from lightning_moevlm.contracts.answer_list import AnswerList, write_answers
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.exported_model import DataFacts, SourceRun, read_exported_config
from lightning_moevlm.data.images.decode import decode_image
from lightning_moevlm.data.text.tokenizer import read_tokenizer
from lightning_moevlm.model.exported import load_exported
from lightning_moevlm.model.objectives import AnswerClassification
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.checkpoints.checkpoint_file import inspect_checkpoint
from lightning_moevlm.training.checkpoints.export import export_model
from lightning_moevlm.training.checkpoints.init_from import InitFrom, load_initial_weights
from tests.conftest import PROJECT, last_checkpoint, run_in
from tests.small_model import small_limoe
from tests.small_run import SMALL, budget

IMPORTED = """
import sys, torch
torch.save({name: value.detach() for name, value in features.items()}, "features.pt")
heavy = {"lightning", "lightning_fabric", "pytorch_lightning", "mlflow", "sklearn", "webdataset"}
print(sorted(heavy & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def place(shared_workplace: Path) -> Path:
    """A workplace with a short training, its checkpoint `runs/.../last.ckpt`, and its export `exported`."""
    run_in(shared_workplace, "fit", *SMALL, *budget(2))
    run_in(shared_workplace, "export", str(last_checkpoint(shared_workplace)), "--out", "exported")
    return shared_workplace


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    """A copy of the export."""
    return Path(shutil.copytree(place / "exported", tmp_path / "exported"))


def run(*arguments: str, code: int = 0) -> None:
    assert main(list(arguments)) == code, arguments


def edit(out: Path, **changes: Any) -> None:
    config = json.loads((out / "config.json").read_text("utf-8"))
    (out / "config.json").write_text(json.dumps(config | changes), "utf-8")


def test_the_folder_says_what_it_holds(place: Path) -> None:
    config = read_exported_config(place / "exported")
    assert config.backbone["class_path"] == "VLMoE" and config.objective["class_path"] == "MaskedModelling"
    assert config.backbone["init_args"]["moe"]["init_args"]["router"]["class_path"] == "TopKRouter"
    assert (config.data.image_size, config.data.max_text_len) == (32, 24)
    assert config.source.step == 2 and config.source.checkpoint == "last.ckpt"
    assert config.source.run == last_checkpoint(place).parent.parent.name and len(str(config.source.manifest)) == 64
    assert sorted(path.name for path in (place / "exported").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert len({path.stat().st_mode for path in (place / "exported").iterdir()}) == 1  # all for others to read
    saved = torch.load(last_checkpoint(place), weights_only=True)["state_dict"]
    written = load_file(place / "exported/model.safetensors")
    assert saved.keys() == written.keys() and all(torch.equal(saved[name], written[name]) for name in saved)


def test_features_are_those_of_predict_without_lightning(
    place: Path, monkeypatch: pytest.MonkeyPatch, scenes_root: Path
) -> None:
    monkeypatch.chdir(place)
    pixels = (torch.arange(40 * 48 * 3) % 251).to(torch.uint8).reshape(40, 48, 3).numpy()
    (place / "apple.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    guide = (PROJECT / "lightning_moevlm/README.md").read_text("utf-8").split("## In plain PyTorch")[1]
    program = guide.split("```python\n")[1].split("```")[0] + IMPORTED
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    module = load_module(last_checkpoint(place))
    text = read_tokenizer(scenes_root / "tokenizer.json").encode(["a red apple"], 24)
    image = decode_image((place / "apple.jpg").read_bytes(), "image", 32)[None]
    with torch.inference_mode():
        expected = module.predict_step(Batch(image, *text[:2], ("apple",)), 0)
    found = torch.load(place / "features.pt", weights_only=True)
    assert found.keys() == expected.keys() == {"image", "text", "pair"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_training_starts_from_it_and_evaluation_reads_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    quiet = ("--trainer.logger=false", "--trainer.callbacks=[]")
    few = ("--trainer.limit_predict_batches=1", "--trainer.callbacks+=FeatureWriter", "--trainer.callbacks.folder=f")
    run("predict", *SMALL, *quiet, *few, "--ckpt_path=exported")
    written = load_file(place / "f/features-0000-000000.safetensors")
    trained = load_run(last_checkpoint(place))
    with torch.inference_mode():
        expected = trained.module.predict_step(next(iter(build_data(trained.resolved["data"]).predict_dataloader())), 0)
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in written)
    for value in trained.module.parameters():
        torch.nn.init.zeros_(value)
    loaded = load_initial_weights(trained.module, InitFrom("exported"))
    assert not loaded.new and not loaded.left
    there = trained.checkpoint["state_dict"]
    assert all(torch.equal(value, there[name]) for name, value in trained.module.state_dict().items())


def test_it_is_no_state_of_training(place: Path) -> None:
    out = place / "exported"
    with pytest.raises(UserError, match=rf"start a new run from its weights with --model.init_from.checkpoint {out}"):
        inspect_checkpoint(str(out), "fit", place)
    assert inspect_checkpoint(str(out), "test", place) is not None


def test_an_export_is_not_overwritten_by_chance(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for out, told in (
        ("exported", "exported holds an exported model: give --out another folder, or --force true to replace it"),
        ("conf", "conf exists and is not an exported model"),
    ):
        run("export", str(last_checkpoint(place)), "--out", out, code=2)
        assert told in capfd.readouterr().err
    assert not list(place.glob(".*exporting*"))
    run("export", str(last_checkpoint(place)), "--out", "other", "--config", "elsewhere.yaml", code=2)
    assert "has no configuration at elsewhere.yaml" in capfd.readouterr().err


def test_other_data_do_not_give_their_tokenizer(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], scenes_root: Path
) -> None:
    monkeypatch.chdir(place)
    before = {path.name: path.read_bytes() for path in (place / "exported").iterdir()}
    link = place / "data/shards/scenes"
    link.unlink()
    try:
        shutil.copytree(scenes_root, link)
        manifest = json.loads((link / "manifest.json").read_text("utf-8"))
        (link / "manifest.json").write_text(json.dumps(manifest | {"licence": "another"}), "utf-8")
        again = ("export", str(last_checkpoint(place)), "--out", "exported", "--force", "true")
        run(*again, code=2)
        assert "the data of this run have changed since its training" in capfd.readouterr().err
        run(*again, f"--tokenizer={scenes_root}/tokenizer.json")
        assert {path.name: path.read_bytes() for path in (place / "exported").iterdir()} == before
    finally:
        shutil.rmtree(link, ignore_errors=True)
        link.symlink_to(scenes_root, target_is_directory=True)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def spoil(name: str) -> Callable[[Path], None]:
    """Return what makes an export invalid or malicious."""

    def pickled(out: Path) -> None:
        (out / "model.safetensors").write_bytes(pickle.dumps(Bomb(out / "mark")))

    def saved_by_torch(out: Path) -> None:
        torch.save({"weight": Bomb(out / "mark")}, out / "model.safetensors")

    def cut(out: Path) -> None:
        data = (out / "model.safetensors").read_bytes()
        (out / "model.safetensors").write_bytes(data[: len(data) // 2])

    def other_shape(out: Path) -> None:
        weights = load_file(out / "model.safetensors")
        weights["backbone.norm.weight"] = torch.ones(17)
        save_file(weights, out / "model.safetensors")

    def fewer(out: Path) -> None:
        weights = load_file(out / "model.safetensors")
        del weights["backbone.norm.weight"]
        save_file(weights, out / "model.safetensors")

    def router(path: object) -> Callable[[Path], None]:
        def change(out: Path) -> None:
            config = json.loads((out / "config.json").read_text("utf-8"))
            config["backbone"]["init_args"]["moe"]["init_args"]["router"] = path
            (out / "config.json").write_text(json.dumps(config), "utf-8")

        return change

    return {
        "pickle": pickled,
        "torch": saved_by_torch,
        "cut": cut,
        "empty": lambda out: (out / "model.safetensors").write_bytes(b""),
        "no weights": lambda out: (out / "model.safetensors").unlink(),
        "other shape": other_shape,
        "fewer": fewer,
        "no config": lambda out: (out / "config.json").unlink(),
        "no json": lambda out: (out / "config.json").write_text("{"),
        "a list": lambda out: (out / "config.json").write_text("[1]"),
        "newer": lambda out: edit(out, format="moevlm-export/2", package_version="7.0"),
        "another program's": lambda out: edit(out, format="transformers"),
        "unknown field": lambda out: edit(out, more=1),
        "system": lambda out: edit(out, backbone={"class_path": "os.system", "init_args": {"command": "touch mark"}}),
        "a module of one's own": router({"class_path": "bomb.Router"}),
        "a short form": router("bomb.Router"),
        "a function": router("lightning_moevlm.cli.main.main"),
        "an unknown part": router({"class_path": "NoRouter"}),
        "an unknown option": router({"class_path": "TopKRouter", "init_args": {"top": 2}}),
        "another base": router({"class_path": "lightning_moevlm.model.backbones.limoe.LIMoE"}),
        "a file elsewhere": lambda out: edit(out, files={"backbone.init_args.patch_codebook": "../../secret"}),
        "a file as a class": lambda out: edit(out, files={"backbone.class_path": "bomb.Router"}),
        "a file for nothing": lambda out: edit(out, files={"backbone.options.codebook": "config.json"}),
    }[name]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pickle", "model.safetensors is not a whole safetensors file"),
        ("torch", "model.safetensors is not a whole safetensors file"),
        ("cut", "model.safetensors is not a whole safetensors file"),
        ("empty", "model.safetensors is not a whole safetensors file"),
        ("no weights", "model.safetensors is missing: copy the whole folder"),
        ("other shape", r"backbone.norm.weight is \(17,\) in it, and \(16,\) by config.json; copy both files"),
        ("fewer", r"backbone.norm.weight is missing in it, and \(16,\) by config.json"),
        ("no config", "config.json cannot be read"),
        ("no json", "config.json is not the configuration of an exported model"),
        ("a list", "config.json is not the configuration of an exported model"),
        ("newer", r"of format moevlm-export/2, written by lightning-moevlm 7.0; .* Install a newer version"),
        ("another program's", "format is 'transformers'"),
        ("unknown field", "more"),
        ("system", "backbone.class_path is os.system, which is not a known part"),
        ("a module of one's own", "router.class_path is bomb.Router, which is not a known part.* import bomb first"),
        ("a short form", "router is bomb.Router, which is not a known part"),
        ("a function", "router is lightning_moevlm.cli.main.main, which is not a known part"),
        ("an unknown part", "NoRouter"),
        ("an unknown option", "top"),
        ("another base", "LIMoE"),
        ("a file elsewhere", "names the file '../../secret': only files in its own folder are allowed"),
        ("a file as a class", "names a file for backbone.class_path, which is no option"),
        ("a file for nothing", "names a file for backbone.options.codebook, which is no option"),
    ],
)
def test_a_folder_is_data_and_is_refused_where_it_is_not(
    name: str, told: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"import pathlib; pathlib.Path({str(out / 'mark')!r}).touch()\nclass Router: pass"
    (out.parent / "bomb.py").write_text(text)
    monkeypatch.syspath_prepend(str(out.parent))
    spoil(name)(out)
    with pytest.raises(UserError, match=told) as caught:
        load_exported(out)
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)
    assert not (out / "mark").exists() and not Path("mark").exists()
    assert "bomb" not in sys.modules


def test_a_copy_is_whole(out: Path) -> None:
    assert load_exported(out).backbone.spec.dim == 16


def test_files_that_parts_read_are_exported_with_them(tmp_path: Path, place: Path) -> None:
    file = tmp_path / "answers.json"
    write_answers(AnswerList(("yes", "no", "two"), (3, 2, 1), "digest"), file)
    module = VisionLanguageModule(small_limoe(), lambda spec: AnswerClassification(spec, str(file)))
    sizes = {"dim": 32, "num_heads": 2, "num_blocks": 4, "hidden_dim": 64, "image_size": 16, "patch_size": 8}
    moe = {"num_experts": 4, "experts": {"class_path": "MLPExperts", "init_args": {"hidden_dim": 48}}}
    backbone = {"vocab_size": 300, "max_text_len": 8, "moe": {"class_path": "MoEFFN", "init_args": moe}}
    section = {
        "backbone": {"class_path": "lightning_moevlm.model.backbones.LIMoE", "init_args": sizes | backbone},
        "objective": {"class_path": "AnswerClassification", "init_args": {"answers": str(file)}},
        "precision": {"router": "bfloat16"},
    }
    config = export_model(module, section, DataFacts(16, 8, 300), SourceRun("a.ckpt", 1), None, tmp_path / "with_file")
    file.unlink()
    assert config.files == {"objective.init_args.answers": "answers.json"} and config.tokenizer is None
    loaded = load_exported(tmp_path / "with_file")
    assert loaded.objective.answers == ("yes", "no", "two")  # type: ignore[union-attr]
    assert loaded.backbone.precision.router == "bfloat16" == loaded.objective.precision.router  # type: ignore[union-attr]
