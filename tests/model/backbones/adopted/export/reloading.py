"""Saves small models, loads them in transformers, and compares."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lightning_moevlm.model.backbones import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.export.save import Saved, save_for_transformers
from tests.small_model import pair_batch

BATCH = pair_batch()


def logits(model: HuggingFaceModel) -> Tensor:
    """Return the logits of images and texts, or of texts."""
    images = BATCH.images_BRYX if model.images is not None else None
    with torch.no_grad():
        output = model.eval()(images, *BATCH[1:3])
        return model.predict_text(output.tokens_BSD)[output.layout.valid_BS].float()


def moved(model: HuggingFaceModel) -> HuggingFaceModel:
    """The model with other weights and biases, as after training; experts and choices differ then."""
    sample = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=sample))
        for layer in model.layers:
            for name, buffer in layer.router.named_buffers():
                if name == "bias_AE":
                    buffer.copy_(0.2 * torch.randn(buffer.shape, generator=sample))
    return model


def load(folder: Path, saved: Saved, **options: Any) -> Any:
    """Load a folder in transformers, which must find all weights, and none that it does not know."""
    auto = transformers.AutoModelForImageTextToText if saved.sees else transformers.AutoModelForCausalLM
    loaded, report = auto.from_pretrained(folder, trust_remote_code=saved.is_own, output_loading_info=True, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded).__name__ == saved.model_class
    return loaded


def assert_reloads(model: HuggingFaceModel, folder: Path, rtol: float = 1e-4, atol: float = 1e-5) -> Saved:
    """Save a model, load it in transformers, and compare the logits; a class of ours twice."""
    ours = logits(model)
    saved = save_for_transformers(model, folder)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "lightning_moevlm"}
    sys.modules["lightning_moevlm"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        model.model = load(folder, saved)
    finally:
        sys.modules.update(hidden)
    torch.testing.assert_close(logits(model), ours, rtol=rtol, atol=atol)
    if saved.is_own:
        again = folder.with_name(f"{folder.name}_again")
        model.model.save_pretrained(again)
        model.model = load(again, saved)
        torch.testing.assert_close(logits(model), ours, rtol=rtol, atol=atol)
    return saved
