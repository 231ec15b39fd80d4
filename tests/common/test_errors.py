"""Errors of libraries that miss a package name it, with its name for pip."""

import pytest
import torch

from lightning_moevlm.common.errors import UserError, explain_allocation, say_missing_package


@pytest.mark.parametrize(
    ("text", "package"),
    [
        ("\nQwen3VLVideoProcessor requires the Torchvision library but it was not found in\nyour", "torchvision"),
        ("X requires the PIL library but it was not found in your environment.", "pillow"),
        ("X requires the 🤗 Tokenizers library but it was not found", "tokenizers"),
        ("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.", "tiktoken"),
        ("No module named 'sentencepiece'", "sentencepiece"),
    ],
)
def test_the_package_is_named(text: str, package: str) -> None:
    said = say_missing_package(ImportError(text))
    assert said is not None
    assert said.startswith(f"needs the package {package}, which is not installed: pip install {package}")


def test_a_torchvision_of_another_build_is_named_though_it_is_the_cause_of_a_cause() -> None:
    error = ModuleNotFoundError("Could not import module 'Qwen3VLMoeForConditionalGeneration'.")
    error.__cause__ = RuntimeError("operator torchvision::nms does not exist")
    said = say_missing_package(error)
    assert said is not None
    assert said.startswith("needs a torchvision that fits your torch")


def test_other_errors_are_left_alone() -> None:
    assert say_missing_package(OSError("no file named model.safetensors")) is None


def test_memory_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="one of its tensors takes 4,000,000,000 GB"), explain_allocation():
        torch.empty(10**18)
    with pytest.raises(RuntimeError, match="invalid"), explain_allocation():
        raise RuntimeError("invalid")
