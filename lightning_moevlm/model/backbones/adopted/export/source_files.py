"""Puts tokenizer and processor beside an exported model: those that it came with, or the tokenizer of its data."""

import fnmatch
import shutil
from pathlib import Path

from lightning_moevlm.contracts.special_tokens import BOS, SPECIAL_TOKENS

_KEPT = ("*.json", "*.jinja", "*.model", "vocab.*", "merges.txt")
_OF_WEIGHTS = ("config.json", "generation_config.json", "*.index.json", "adapter_config.json")


def copy_source_files(source: str, folder: Path) -> list[str]:
    """Copy tokenizer, processor and chat template of a model, and return their names; nothing is fetched.

    Args:
        source: directory of the model, or its name on the hub, if it was fetched before.
        folder: of the export.
    """
    origin = Path(source)
    if not origin.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            origin = Path(snapshot_download(source, local_files_only=True))
        except LocalEntryNotFoundError:
            return []
    copied = []
    for file in sorted(origin.iterdir()):
        kept = any(fnmatch.fnmatch(file.name, pattern) for pattern in _KEPT)
        if file.is_file() and kept and not any(fnmatch.fnmatch(file.name, pattern) for pattern in _OF_WEIGHTS):
            shutil.copyfile(file, folder / file.name)
            copied.append(file.name)
    return copied


def write_tokenizer(content: str, folder: Path) -> list[str]:
    """Write a tokenizer that begins with our control tokens as transformers reads it; return the names of its files.

    Args:
        content: of its file for the tokenizers library.
        folder: of the export.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(content)
    begin = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, BOS)])
    pad, mask, bos, eos = SPECIAL_TOKENS
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, mask_token=mask, bos_token=bos, eos_token=eos
    )
    before = {file.name for file in folder.iterdir()}
    own.save_pretrained(folder)
    return sorted({file.name for file in folder.iterdir()} - before)
