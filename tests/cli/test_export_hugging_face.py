"""`moevlm export --format hf`: a folder that transformers loads, and the commands of what evaluates it. Extra `hf`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

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


def test_other_backbones_are_refused(moevlm: Callable[..., str], workplace: Path) -> None:
    moevlm("fit", *SMALL, *budget(1))
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    told = moevlm("export", str(checkpoint), "--format", "hf", "--out", "exported", code=2)
    assert "this run's is VLMoE: leave --format out" in told
    assert not Path("exported").exists()
