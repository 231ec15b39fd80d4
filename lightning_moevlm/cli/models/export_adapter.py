"""`moevlm export --format peft`: low-rank adapters as peft loads them over the checkpoint that they were trained on."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lightning_moevlm.common.atomic_files import write_folder
from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from lightning_moevlm.configuration.resolver import LoadedRun


def export_adapter(run: "LoadedRun", target: Path) -> None:
    """Write the adapters of a run to a folder, whole or not at all, and print how they are loaded.

    Raises:
        UserError: another backbone, or adapters that peft cannot load.
    """
    from lightning_moevlm.cli.models.export_sample import draw_chats
    from lightning_moevlm.model.backbones import HuggingFaceModel
    from lightning_moevlm.model.backbones.adopted.export.adapter import save_adapter

    backbone = run.module.backbone
    if not isinstance(backbone, HuggingFaceModel):
        raise UserError(
            f"--format peft writes adapters of Hugging Face transformers, and this run's model is "
            f"{type(backbone).__name__}: leave --format out"
        )
    path = run.resolved["model"]["backbone"]["init_args"]["path"]
    chats = draw_chats(run.resolved, backbone.images is not None)
    with write_folder(target) as unfinished:
        saved = save_adapter(backbone, path, unfinished, chats)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    whole = f", and {len(saved.modules)} routers or experts whole" if saved.modules else ""
    lines = (
        f"wrote {target}: {saved.num_adapters} low-rank adapters{whole} ({size / 1e6:,.1f} MB), for {path}",
        f"logits differ from those of the trained model by at most {saved.difference:.2g} of {saved.scale:.2g}",
        f"load:        base = transformers.{saved.auto_class}.from_pretrained('{path}')",
        f"             peft.PeftModel.from_pretrained(base, '{target}')",
    )
    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        console.print(line, markup=False)
