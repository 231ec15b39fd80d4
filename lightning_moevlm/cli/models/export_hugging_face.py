"""`moevlm export --format hf`: a model of transformers as transformers reads it, and commands that evaluate it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_moevlm.common.atomic_files import write_folder
from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from lightning_moevlm.configuration.resolver import LoadedRun
    from lightning_moevlm.model.backbones.adopted.export.save import Saved

_LMMS_EVAL = {
    "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl", "qwen3_vl_moe": "qwen3_vl",
    "gemma3": "gemma3", "llava": "llava_hf", "llava_next": "llava_hf", "llava_onevision": "llava_hf",
}  # fmt: skip
"""Names that lmms-eval has for families; its model `huggingface` loads any other, and code beside the weights."""
_VLMEVALKIT = {
    "qwen2_vl": "Qwen2VLChat", "qwen2_5_vl": "Qwen2VLChat", "qwen3_vl": "Qwen3VLChat", "qwen3_vl_moe": "Qwen3VLChat",
    "gemma3": "Gemma3", "llava_onevision": "LLaVA_OneVision_HF",
}  # fmt: skip
"""Classes of VLMEvalKit that load a family from a directory, without code beside the weights."""
_CONFIG = "vlmevalkit.json"


def export_hugging_face(run: "LoadedRun", target: Path, tokenizer: Callable[[], Any]) -> None:
    """Write a run's model of transformers to a folder, whole or not at all, and print what evaluates it.

    Args:
        run: whose backbone is a HuggingFaceModel.
        target: the folder; an exported model that is there gives way.
        tokenizer: of the run's data, called only if it is needed.

    Raises:
        UserError: another backbone, or a model that transformers cannot compute.
    """
    from lightning_moevlm.cli.models.export_sample import draw_chats
    from lightning_moevlm.model.backbones import HuggingFaceModel
    from lightning_moevlm.model.backbones.adopted.export.save import save_for_transformers

    backbone = run.module.backbone
    if not isinstance(backbone, HuggingFaceModel):
        raise UserError(
            f"--format hf writes models of Hugging Face transformers, and this run's is {type(backbone).__name__}: "
            "leave --format out, plain PyTorch reads it then"
        )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    chats = draw_chats(run.resolved, backbone.images is not None)
    with write_folder(target) as unfinished:
        saved = save_for_transformers(backbone, unfinished, chats)
        files = _add_files(run.resolved, unfinished, tokenizer)
        commands = _evaluators(saved, target, unfinished)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    lines = [f"wrote {target}: {saved.model_class} ({size / 1e6:,.1f} MB), {saved.text_type} as its language model"]
    lines.append(
        f"logits differ from those of the trained model by at most {saved.difference:.2g} of {saved.scale:.2g}"
    )
    if saved.is_own:
        lines.append(f"{saved.why_own}: the class is in modeling_moevlm.py beside the weights")
    if saved.num_adapters:
        lines.append(f"{saved.num_adapters} low-rank adapters are merged into their matrices")
    if saved.rounded:
        lines.append(f"routers are rounded to {saved.rounded}")
    console = Console(soft_wrap=True, highlight=False)
    for line in [*lines, files, *commands]:
        console.print(line, markup=False)


def _add_files(resolved: Mapping[str, Any], folder: Path, tokenizer: Callable[[], Any]) -> str:
    """Put tokenizer and processor into the folder, and return a line that says which."""
    from lightning_moevlm.model.backbones.adopted.export.source_files import copy_source_files, write_tokenizer

    chat = resolved["data"].get("chat")
    source = chat["processor"] if chat else resolved["model"]["backbone"]["init_args"]["path"]
    if source is not None:
        copied = copy_source_files(source, folder)
        said = f"copied from {source}: {', '.join(copied) or 'nothing, for there is no tokenizer or processor'}"
        return (
            said
            if chat
            else f"{said}. This run encoded texts by its data's own tokenizer, which may number them otherwise"
        )
    own = tokenizer()
    if own.control.to_model is not None:
        return "no tokenizer: this run numbers the control tokens of data.tokenizer anew, which transformers cannot"
    return f"the tokenizer of the data: {', '.join(write_tokenizer(own.to_json(), folder))}; there is no processor"


def _evaluators(saved: "Saved", target: Path, folder: Path) -> list[str]:
    """Return lines with the commands of evaluation harnesses, which are not part of this package."""
    remote = ", trust_remote_code=True" if saved.is_own else ""
    loader = "AutoModelForImageTextToText" if saved.sees else "AutoModelForCausalLM"
    lines = ["", f"load:        transformers.{loader}.from_pretrained('{target}'{remote})"]
    options = f"pretrained={target}{remote.replace(' ', '')}"
    if not saved.sees:
        return [*lines, f"lm-eval:     lm_eval --model hf --model_args {options} --tasks hellaswag --batch_size 8"]
    name = "huggingface" if saved.is_own else _LMMS_EVAL.get(saved.model_type, "huggingface")
    lines.append(
        f"lmms-eval:   python -m lmms_eval --model {name} --model_args {options} --tasks mme --batch_size 1 "
        f"--output_path {target}/lmms_eval"
    )
    if saved.model_type == "qwen3_vl_moe":
        lines.append("             (it knows a mixture by a path with the like of A3B in it: rename the folder)")
    kit = None if saved.is_own else _VLMEVALKIT.get(saved.model_type)
    if kit is None:
        return [*lines, f"VLMEvalKit:  it has no class that loads {saved.model_type} from a folder"]
    content = {
        "model": {target.name: {"class": kit, "model_path": str(target.absolute())}},
        "data": {"MMBench_DEV_EN": {"class": "ImageMCQDataset", "dataset": "MMBench_DEV_EN"}},
    }
    (folder / _CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [*lines, f"VLMEvalKit:  python run.py --config {target / _CONFIG}"]
