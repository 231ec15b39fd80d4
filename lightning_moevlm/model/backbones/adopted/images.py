"""Turns images into what the vision towers of transformers take.

grid     Qwen-VL and its kin: flat patches in the order of merged squares, and the size of each image in patches
plain    LLaVA and its kin: pixels

Values are (x - mean) / std per channel, with mean and std 0.5, or those of the model's own preprocessor.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError

_HALF = (0.5, 0.5, 0.5)
_OF_ONE_SIZE = ("clip_vision_model", "siglip_vision_model")
"""Vision towers that have one embedding per patch of images of their own size, and refuse other sizes."""


class ImageInputs(NamedTuple):
    """How a model sees images of one size.

    image_size: pixels, height and width. patch_size: pixels, of what its vision tower embeds.
    merge: patches of a side that become one token. frames: of a patch in time; 0: pixels are taken as they are.
    mean, std: of each channel.
    """

    image_size: int
    patch_size: int
    merge: int
    frames: int
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF

    @property
    def token_size(self) -> int:
        """Pixels of one token, height and width."""
        return self.patch_size * self.merge

    @property
    def names(self) -> tuple[str, ...]:
        """Arguments of a forward pass that hold images."""
        return ("pixel_values", "image_grid_thw") if self.frames else ("pixel_values",)

    def __call__(self, images_BRYX: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the arguments of a forward pass over these uint8 images."""
        mean_R11, std_R11 = (
            torch.tensor(values, dtype=torch.float32, device=images_BRYX.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        pixels_BRYX = (images_BRYX.float() / 255 - mean_R11) / std_R11
        if not self.frames:
            return {"pixel_values": pixels_BRYX.to(dtype)}
        count, channels = pixels_BRYX.shape[:2]
        side = self.image_size // self.patch_size
        squares = side // self.merge
        patches = pixels_BRYX.reshape(
            count, channels, squares, self.merge, self.patch_size, squares, self.merge, self.patch_size
        )
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7)  # image, square, patch in it, channel, pixel
        patches = patches.unsqueeze(6).expand(*patches.shape[:6], self.frames, *patches.shape[6:])
        grid = torch.tensor([[1, side, side]], device=images_BRYX.device)
        return {
            "pixel_values": patches.reshape(count * side * side, -1).to(dtype),
            "image_grid_thw": grid.expand(count, 3).contiguous(),
        }


def image_inputs(config: Any, image_size: int, path: str | None) -> ImageInputs | None:
    """Return how a model with this configuration sees images; None: it has no vision tower.

    Raises:
        UserError: a size that its patches do not divide, or a tower without patches.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    patch_size = getattr(vision, "patch_size", None)
    if not isinstance(patch_size, int):
        raise UserError(
            f"the vision tower of {config.model_type} has no single patch_size, and how it takes images is not known: "
            "choose a model whose vision tower embeds square patches, or a language model"
        )
    # a patch of ERNIE is one frame, and frames are merged later
    frames = getattr(vision, "temporal_patch_size", None) or int(hasattr(vision, "temporal_merge_size"))
    merge = getattr(vision, "spatial_merge_size", 1) if frames else 1
    if image_size % (patch_size * merge):
        raise UserError(
            f"data.image_size {image_size} is not a multiple of {patch_size * merge}, the {merge} x {merge} patches of "
            f"{patch_size} pixels that {config.model_type} makes one token of: choose a multiple"
        )
    own_size = getattr(vision, "image_size", None)
    if vision.model_type in _OF_ONE_SIZE and image_size != own_size:
        raise UserError(
            f"data.image_size is {image_size}, and the vision tower of {config.model_type} takes images of {own_size} "
            f"pixels alone: set data.image_size to {own_size}"
        )
    inputs = ImageInputs(image_size, patch_size, merge, frames)
    own = {} if path is None else _read_processor(Path(path))
    return inputs._replace(mean=tuple(own.get("image_mean", _HALF)), std=tuple(own.get("image_std", _HALF)))


def _read_processor(folder: Path) -> dict[str, Any]:
    """Return what a model's directory says of its images; transformers 5 saves the whole processor in one file."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text("utf-8"))
            own = content if key is None else content.get(key)
            if own:
                return dict(own)
    return {}
