"""`moevlm audit`: open faults of transformers seen by the command itself, its page, its samples and its refusals."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.cli.main import main
from tests.model.backbones.adopted.small_hugging_face import DEEPSEEK, LLAVA, OLMOE, QWEN, TEXT

Audited = Callable[..., dict[str, Any]]


@pytest.fixture
def audited(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Audited:
    """Audit a model with random weights; return the record."""
    monkeypatch.chdir(tmp_path)

    def run(config: dict[str, Any], *options: str) -> dict[str, Any]:
        file = tmp_path / "model.json"
        file.write_text(json.dumps(config))
        assert main(["audit", "--config", str(file), "--num-samples", "4", *options, "--json", "-"]) == 0
        (record,) = json.loads(capfd.readouterr().out)
        return record  # type: ignore[no-any-return]

    return run


def test_a_coefficient_without_its_switch_is_dead_and_the_trainer_doubles_the_loss(audited: Audited) -> None:
    """LlamaFactory#10302 and transformers#48690, on the installed transformers."""
    record = audited(OLMOE | {"router_aux_loss_coef": 0.5})
    assert record["verdicts"] == {
        "as configured": "dead",
        "config.output_router_logits: true": "alive",
        "output_router_logits=True in the call": "alive",
    }
    assert record["balance"]["coefficients"] == [["config.router_aux_loss_coef", 0.5]]
    acting = record["balance"]["settings"][1]
    assert acting["scale"] == pytest.approx(1.0, abs=1e-3)
    assert acting["added"] == pytest.approx(0.5 * 2, rel=0.1)  # K under perfect balance
    assert 0 < acting["share"] <= 1.5
    assert record["balance"]["over_parts"] == pytest.approx(2.0, rel=0.02)
    said = " ".join(record["finding"])
    assert "As configured its balance loss is dead: config.router_aux_loss_coef is 0.5" in said
    assert "Over two micro-batches or two ranks the Trainer of transformers adds 2.0" in said
    assert "So nothing balances the experts" in said


def test_the_switch_of_a_wrapper_is_dead(audited: Audited) -> None:
    """transformers#48885: vision-language wrappers ignore `config.output_router_logits`."""
    record = audited(QWEN | {"text_config": QWEN["text_config"] | {"output_router_logits": False}})
    assert record["verdicts"] == {
        "as configured": "dead",
        "config.output_router_logits: true": "dead",
        "config.text_config.output_router_logits: true": "alive",
        "output_router_logits=True in the call": "alive",
    }
    said = record["finding"]
    acting = "config.text_config.output_router_logits: true"
    assert said[2] == f"It acts with {acting} or output_router_logits=True in the call."
    assert said[3].startswith(f"With {acting} it adds ")
    assert said[4] == "This switch is dead: config.output_router_logits: true."
    assert record["balance"]["over_parts"] == pytest.approx(1.0, rel=0.02)  # its Trainer counts no items
    assert [(load["modality"], load["tokens"] > 0) for load in record["loads"]] == [("image", True), ("text", True)] * 2
    assert record["sample"].startswith("4 scenes with their captions, drawn for this")


def test_a_switch_in_the_configuration_acts(audited: Audited) -> None:
    record = audited(QWEN | {"text_config": QWEN["text_config"] | {"output_router_logits": True}})
    assert record["verdicts"]["as configured"] == "alive"
    assert not any("nothing balances" in sentence for sentence in record["finding"])


def test_no_switch_helps_a_wrapper_around_any_language_model(audited: Audited) -> None:
    record = audited(LLAVA)
    assert set(record["verdicts"].values()) == {"dead"}
    assert "None of its switches turns it on." in record["finding"]


def test_families_with_a_bias_that_nothing_moves(audited: Audited) -> None:
    """transformers#48911, LlamaFactory#9208."""
    record = audited(DEEPSEEK)
    (router,) = record["routers"]
    assert router["bias"] == {"name": "e_score_correction_bias", "mover": "nothing", "lowest": 0.0, "highest": 0.0}
    assert router["shared"] == [{"name": "shared_experts", "size": 1.0}]
    assert (router["score"], router["weight_sum"]) == ("sigmoid", 2.5)
    said = " ".join(record["finding"])
    assert "has no balance loss for this family" in said
    assert "1 router chooses by a balancing bias (e_score_correction_bias, all 0) that nothing moves" in said


def test_a_loss_that_counts_twice_is_seen(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.olmoe import modeling_olmoe

    theirs = modeling_olmoe.load_balancing_loss_func
    monkeypatch.setattr(modeling_olmoe, "load_balancing_loss_func", lambda *args: 2 * theirs(*args))
    record = audited(OLMOE | {"output_router_logits": True})
    assert record["verdicts"]["as configured"] == "doubled"
    assert any("2.00 times what its coefficient says" in sentence for sentence in record["finding"])


class _Text(HTMLParser):
    """Collects the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_directory_gets_a_page_and_samples_of_its_user(
    tmp_path: Path, scenes_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    monkeypatch.chdir(tmp_path)
    transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**TEXT, vocab_size=300)).save_pretrained("model")
    Path("texts.txt").write_text("one line\n\nanother line\na third\n")
    assert main(["audit", "model", "--texts", "texts.txt"]) == 0
    printed = capfd.readouterr().out
    for words in ("2 routers in 2 layers", "Sample: 2 texts of texts.txt", "Page: audit_model.html", "Loads of the"):
        assert words in printed
    page = _Text()
    page.feed(Path("audit_model.html").read_text("utf-8"))
    assert "As configured its balance loss is dead" in page.text
    assert "2 texts of texts.txt; ids by bytes of the texts" in page.text
    assert main(["audit", "model", "--data", str(scenes_root), "--num-samples", "6", "--json", "audit.json"]) == 0
    (record,) = json.loads(Path("audit.json").read_text())
    assert record["sample"].startswith(f"6 captions of the training split of {scenes_root}")


def test_mistakes_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense, refused = ({"model_type": family} | sizes for family in ("llama", "llama4_text"))
    Path("moevlm.yaml").write_text(yaml.safe_dump({"model": {"backbone": {"class_path": "VLMoE"}}}))
    Path("list.yaml").write_text("[1, 2]")
    Path("empty.txt").write_text("\n")
    Path("folder").mkdir()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("torn").mkdir()
    Path("torn/config.json").write_text(json.dumps(OLMOE | {"vocab_size": 300}))
    Path("torn/model.safetensors").write_text("cut off")
    ours = {"class_path": "HuggingFaceModel", "init_args": {"config": OLMOE, "upcycle": {"num_experts": 4}}}
    Path("upcycled.yaml").write_text(yaml.safe_dump({"model": {"backbone": ours}}))
    olmoe = ("--config", json.dumps(OLMOE))
    for arguments, told in (
        (["nowhere"], "nowhere is not a folder: give one that save_pretrained wrote"),
        (["folder"], "transformers cannot build the path folder"),
        ([], "takes either a PATH or --config"),
        (["folder", *olmoe], "takes either a PATH or --config"),
        (["--config", json.dumps(dense)], "LlamaForCausalLM has no router beside experts"),
        (["--config", json.dumps(refused | {"num_local_experts": 2})], "cannot be adopted: at "),
        (["--config", "{model_type: no_such_family}"], "cannot build the config of no_such_family"),
        (
            ["--config", json.dumps(DEEPSEEK | {"head_dim": 8})],
            "DeepseekV3ForCausalLM fails on the sample: RuntimeError",
        ),
        (["torn"], "transformers cannot build the path torn: SafetensorError"),
        (["list.yaml"], "list.yaml is a file: give the folder that save_pretrained wrote, or --config list.yaml"),
        (["--config", "{model: foo}"], "has no model_type"),
        (["--config", "{model: {backbone: foo}}"], "has no model_type"),
        (["--config", "{model: {backbone: {class_path: HuggingFaceModel, init_args: 3}}}"], "either `path`"),
        (["--config", "{model_type: olmoe, vocab_size: x}"], "Field 'vocab_size' expected int, got str"),
        (["--config", "{model_type: olmoe, text_config: x}"], "transformers cannot build the config of olmoe"),
        (["--config", "upcycled.yaml"], "makes mixtures of ours by model.backbone.upcycle"),
        ([*olmoe, "--device", "cuda"], "device is cuda, and no GPU of this machine is seen"),
        ([*olmoe, "--out", "folder"], "out = folder is a folder. Name a file."),
        ([*olmoe, "--json", "list.yaml/record.json"], "json = list.yaml: "),
        (["--config", "moevlm.yaml"], "has the backbone VLMoE, and moevlm audit is for HuggingFaceModel"),
        (["--config", "missing.yaml"], "--config missing.yaml cannot be read: [Errno 2] No such file"),
        (["--config", "list.yaml"], "holds no mapping: give {model_type: olmoe, ...}"),
        ([*olmoe, "--texts", "empty.txt"], "an audit needs at least 2 texts"),
        ([*olmoe, "--texts", "missing.txt"], "--texts missing.txt cannot be read"),
        (["torn", "--texts", "missing.txt"], "--texts missing.txt cannot be read"),  # before weights are
        ([*olmoe, "--texts", "empty.txt", "--data", "folder"], "give --data or --texts, not both"),
        ([*olmoe, "--batch-size", "3"], "batch_size is 3: choose an even number"),
    ):
        assert main(["audit", *arguments]) == 2, arguments
        error = capfd.readouterr().err
        assert told in error
        assert "Traceback" not in error
        assert len(error) < 1000
    assert not list(tmp_path.glob("*.html"))
