"""`moevlm export`: a trained model as files that plain PyTorch or transformers read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lightning_moevlm.common.errors import UserError


def export(
    checkpoint: str,
    out: str | None = None,
    configuration: str | None = None,
    tokenizer: str | None = None,
    format: Literal["torch", "hf", "peft"] = "torch",
    force: bool = False,
) -> None:
    """Write a trained model as safetensors, with its configuration and tokenizer, for plain PyTorch or transformers.

    Args:
        checkpoint: Checkpoint of a run, such as RUN/checkpoints/last.ckpt.
        out: Folder to write; by default that of the checkpoint without .ckpt.
        configuration: The configuration of its training; by default RUN/config/config.yaml.
        tokenizer: File of the tokenizer; by default that of the run's data.
        format: torch for plain PyTorch; hf for transformers, of a HuggingFaceModel: weights and configuration by
            save_pretrained, with the commands of lmms-eval and VLMEvalKit; peft for the low-rank adapters alone, with
            the routers trained beside them.
        force: Replace an exported model.
    """
    from lightning_moevlm.cli.models.export_adapter import export_adapter
    from lightning_moevlm.cli.models.export_hugging_face import export_hugging_face
    from lightning_moevlm.configuration.resolver import load_run
    from lightning_moevlm.contracts.exported_model import (
        CONFIG_FILE,
        WEIGHTS_FILE,
        DataFacts,
        SourceRun,
        refuse_occupied,
    )
    from lightning_moevlm.data.storage.local import local_target
    from lightning_moevlm.data.text.tokenizer import read_tokenizer
    from lightning_moevlm.training.checkpoints.export import export_model

    path = Path(checkpoint)
    target = local_target(str(path.with_suffix("")) if out is None else out)
    refuse_occupied(target, force)
    run = load_run(path, configuration)

    def own_tokenizer() -> Any:
        return _tokenizer_of(run.resolved["data"], run.checkpoint) if tokenizer is None else read_tokenizer(tokenizer)

    if format == "peft":
        export_adapter(run, target)
        return
    if format == "hf":
        export_hugging_face(run, target, own_tokenizer)
        return
    read = own_tokenizer()
    spec = run.module.backbone.spec
    if read.vocab_size > spec.vocab_size:
        raise UserError(
            f"the tokenizer has {read.vocab_size} ids, and the model embeds {spec.vocab_size}: give the one of its "
            "training, --tokenizer FILE"
        )
    data = DataFacts(spec.image_size, spec.max_text_len, spec.vocab_size)
    folder = path.absolute().parent.parent
    name = folder.name if (folder / "config").is_dir() else None
    source = SourceRun(path.name, int(run.checkpoint.get("global_step", 0)), name, _digest_of(run.checkpoint))
    export_model(run.module, run.resolved["model"], data, source, read.to_json().encode(), target, force)
    size = (target / WEIGHTS_FILE).stat().st_size
    said = f"wrote {target}: {WEIGHTS_FILE} ({size / 1e6:,.1f} MB), {CONFIG_FILE} and what they name"
    Console(soft_wrap=True, highlight=False).print(said, markup=False)


def _tokenizer_of(data: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a run's data, which must be that of the training."""
    from lightning_moevlm.configuration.resolver import build_data

    module = build_data(data)
    try:
        trained_on, now = _digest_of(checkpoint), module.manifest_digest
        read = module.tokenizer
    except UserError as error:
        raise UserError(f"{error}. If the data are elsewhere now, give --tokenizer FILE") from None
    if trained_on not in (None, now):
        raise UserError(
            f"the data of this run have changed since its training (manifest {now[:12]}, then {str(trained_on)[:12]}), "
            "so the tokenizer may be another: give the right one, --tokenizer FILE"
        )
    return read


def _digest_of(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the digest of the training data; None if a checkpoint does not say."""
    digest = checkpoint.get("ShardDataModule", {}).get("order", {}).get("manifest_digest")
    return digest if isinstance(digest, str) else None
