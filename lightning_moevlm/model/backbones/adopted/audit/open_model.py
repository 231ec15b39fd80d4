"""Opens a model for an audit: sizes of images and ids that suit it, and texts as ids of its own tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError, say_missing_package
from lightning_moevlm.model.backbones.adopted.build import DType, Origin, read_config
from lightning_moevlm.model.backbones.adopted.hugging_face import HuggingFaceModel

_SIDE = 8
"""Tokens on each side of an image, where the vision tower takes any size."""
_RANDOM_IDS = 300
_IMAGE_IDS = 4
"""Ids that a model from a configuration gets for images, see `read_config`."""
_FIRST_ID = 3
"""Ids before it are mostly control tokens."""


def open_model(
    path: str | None,
    config: dict[str, Any] | None,
    image_size: int | None,
    max_text_len: int,
    dtype: DType,
    local_files_only: bool,
) -> HuggingFaceModel:
    """Return a model with its own routers.

    Args:
        path: see `HuggingFaceModel`.
        config: see `HuggingFaceModel`; without vocab_size it gets 300 ids.
        image_size: pixels; None takes the size that the vision tower is made for, or 8 x 8 tokens.
        max_text_len: longest text.
        dtype: of weights and computation.
        local_files_only: never fetch.

    Raises:
        UserError: a model that cannot be built or adopted.
    """
    text = (config or {}).get("text_config", config)
    known = text.get("vocab_size") if isinstance(text, dict) else None
    vocab_size = max(1, known - _IMAGE_IDS) if isinstance(known, int) else _RANDOM_IDS
    whole = read_config(Origin(path, config, dtype, None, None, local_files_only, vocab_size))
    if path is not None:
        vocab_size = whole.get_text_config().vocab_size
    return HuggingFaceModel(
        path=path,
        config=config,
        image_size=image_size or _suited_size(whole),
        vocab_size=vocab_size,
        max_text_len=max_text_len,
        dtype=dtype,
        local_files_only=local_files_only,
    )


def encode_texts(backbone: HuggingFaceModel, path: str | None, texts: Sequence[str]) -> tuple[Tensor, Tensor, str]:
    """Return ids (B, L), their mask, and by what they were made.

    path: whose tokenizer is used; without one, ids are bytes, which mean nothing to a trained model.
    """
    length, rows, by = backbone.spec.max_text_len, None, "bytes of the texts, as the model has no tokenizer"
    tokenizer = None if path is None else _tokenizer(path)
    if tokenizer is not None:
        rows, by = [list(tokenizer(text)["input_ids"]) for text in texts], "the model's tokenizer"
    else:
        special = {value for name, value in _numbers(backbone.config) if name.endswith("_token_id")}
        ids = [number for number in range(_FIRST_ID, backbone.text_config.vocab_size) if number not in special]
        rows = [[ids[byte % len(ids)] for byte in text.encode()] for text in texts]
    text_BL = torch.zeros(len(texts), length, dtype=torch.int64)
    mask_BL = torch.zeros(len(texts), length, dtype=torch.bool)
    for place, row in enumerate(rows):
        cut = torch.tensor(row[:length], dtype=torch.int64)
        text_BL[place, : len(cut)], mask_BL[place, : len(cut)] = cut, True
    if not bool(mask_BL.any()):
        raise UserError("the texts of the sample are empty: give others by --texts or --data")
    used = max(2, int(mask_BL.sum(dim=1).max()))
    return text_BL[:, :used], mask_BL[:, :used], by


def _tokenizer(path: str) -> Any:
    """Return the tokenizer beside a model; None if there is none that transformers can read."""
    import transformers

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in names):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = say_missing_package(error)
        said = f"cannot be read: {type(error).__name__}: {str(error).strip().splitlines()[0]}" if said is None else said
        raise UserError(f"the tokenizer of {path} {said}") from error


def _numbers(config: Any) -> list[tuple[str, int]]:
    return [(name, value) for name, value in vars(config).items() if isinstance(value, int)]


def _suited_size(config: Any) -> int:
    """Return a size of images that the vision tower takes; any if there is none."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return _SIDE
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    takes_any = getattr(vision, "temporal_patch_size", None) is not None
    if isinstance(size, int) and not takes_any:
        return size
    return _SIDE * getattr(vision, "spatial_merge_size", 1) * patch if isinstance(patch, int) else _SIDE
