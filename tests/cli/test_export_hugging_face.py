"""`moevlm export --format hf`: a folder that transformers loads, and the commands of what evaluates it. Extra `hf`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

import torch
import transformers

from lightning_moevlm.cli.main import main
from lightning_moevlm.configuration.resolver import load_module
from lightning_moevlm.model.backbones import HuggingFaceModel
from tests.small_run import SMALL, budget

FIT = (
    "fit", "-c", "conf/hugging_face/qwen3_upcycled.yaml", "--data.batch_size=8", "--data.image_size=32",
    "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1",
)  # fmt: skip


def test_an_upcycled_run_is_exported_for_transformers(
    moevlm: Callable[..., str], workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moevlm(*FIT)
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    assert main(["export", str(checkpoint), "--format", "hf", "--out", "exported"]) == 0
    told = capfd.readouterr().out.splitlines()
    assert told[0].startswith("wrote exported: Qwen3VLMoeForConditionalGeneration (")
    assert told[1].startswith("logits differ from those of the trained model by at most ")
    assert told[2] == "the tokenizer of the data: tokenizer.json, tokenizer_config.json; there is no processor"
    commands = [line.split()[0] for line in told[3:] if line.strip()]
    assert commands == ["load:", "lmms-eval:", "(it", "VLMEvalKit:"]
    assert "--model qwen3_vl --model_args pretrained=exported --tasks mme" in told[5]
    kit = json.loads(Path("exported/vlmevalkit.json").read_text())
    assert kit["model"] == {"exported": {"class": "Qwen3VLChat", "model_path": str(workplace / "exported")}}
    loaded = transformers.AutoModelForImageTextToText.from_pretrained("exported")
    ours = load_module(checkpoint).backbone
    assert isinstance(ours, HuggingFaceModel)
    assert loaded.config.text_config.num_experts == 8
    assert len(ours.layers) == 2
    assert main(["export", str(checkpoint), "--format", "hf", "--out", "exported"]) == 2  # needs --force
    assert "--force true to replace it" in capfd.readouterr().err


def test_a_run_with_loss_free_balancing_is_exported_with_its_routers(
    moevlm: Callable[..., str], workplace: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(workplace / "modules"))
    router = "{class_path: SigmoidBiasRouter, init_args: {top_k: 2, score: softmax}}"
    moevlm(*FIT[:2], "conf/hugging_face/qwen3_vl_moe.yaml", *FIT[3:], f"--model.backbone.router={router}")
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    for options in ((), ("--force", "true")):
        assert main(["export", str(checkpoint), "--format", "hf", "--out", "exported", *options]) == 0
    told = capfd.readouterr().out.splitlines()
    name = "Qwen3VLMoeForConditionalGeneration"
    assert told[0].startswith(f"wrote exported: Routed{name} (")
    assert told[2] == (
        f"SigmoidBiasRouter decides as no router of {name} does: the class is in modeling_moevlm.py beside the weights"
    )
    assert "--model huggingface --model_args pretrained=exported,trust_remote_code=True --tasks mme" in told[6]
    loaded = transformers.AutoModelForImageTextToText.from_pretrained("exported", trust_remote_code=True)
    ours = load_module(checkpoint).backbone
    assert isinstance(ours, HuggingFaceModel)
    for layer in ours.layers:
        bias_E = loaded.get_submodule(layer.path.removeprefix("model.")).bias
        assert torch.equal(bias_E, layer.router.get_buffer("bias_AE")[0]) and bool(bias_E.any())


def test_other_backbones_are_refused(moevlm: Callable[..., str], workplace: Path) -> None:
    moevlm("fit", *SMALL, *budget(1))
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    told = moevlm("export", str(checkpoint), "--format", "hf", "--out", "exported", code=2)
    assert "this run's is VLMoE: leave --format out" in told
    assert not Path("exported").exists()
