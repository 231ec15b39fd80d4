"""Random resized crop and flip of a whole batch at once, on whatever device it is on; both are off by default.

Each image has its own crop: area uniform in `crop_area`, aspect ratio log-uniform in `crop_aspect` (Inception, arXiv
1409.4842, as torchvision's RandomResizedCrop draws them, but clipped to the image instead of drawn again). What is
drawn follows from seed, rank, epoch and number of the batch alone, so a resumed run draws what the uninterrupted one
would have drawn, on any device. Scaling to [-1, 1] is the model's: pixels stay uint8.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.common.errors import UserError


@dataclass(frozen=True)
class Augment:
    """What is done to training images.

    crop_area: smallest and largest share of the image that a crop shows; null crops nothing. crop_aspect: smallest
    and largest width over height of a crop. flip: chance of an image to be mirrored; captions that tell left from
    right become false.
    """

    crop_area: tuple[float, float] | None = None
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_area is not None and not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise UserError(
                f"data.augment.crop_area is {list(self.crop_area)}: give [smallest, largest] within (0, 1], or null"
            )
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise UserError(
                f"data.augment.crop_aspect is {list(self.crop_aspect)}, but must be [smallest, largest], both above 0"
            )
        if not 0 <= self.flip <= 1:
            raise UserError(f"data.augment.flip is {self.flip}, but must be a chance from 0 to 1")

    @property
    def is_off(self) -> bool:
        """Whether nothing is done."""
        return self.crop_area is None and self.flip == 0

    def __call__(self, images_BRYX: Tensor, seed: int, rank: int, epoch: int, batch: int) -> Tensor:
        """Return augmented images of the same shape, dtype uint8. batch: its number in the epoch of this rank."""
        if self.is_off:
            return images_BRYX
        boxes_BK = self.boxes(len(images_BRYX), seed, rank, epoch, batch).to(images_BRYX.device, non_blocking=True)
        center_x, center_y, half_width, half_height = boxes_BK.unbind(1)
        zero = torch.zeros_like(center_x)
        theta = torch.stack([half_width, zero, center_x, zero, half_height, center_y], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images_BRYX.shape), align_corners=False)
        # a crop is never larger than the image, so it is only ever enlarged: no need to antialias
        seen = F.grid_sample(images_BRYX.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        return seen.round_().clamp_(0, 255).to(torch.uint8)

    def boxes(self, num_images: int, seed: int, rank: int, epoch: int, batch: int) -> Tensor:
        """Draw crops: (B, 4) fp32 of centre x and y and half width and height, where the image is [-1, 1] x [-1, 1].

        A mirrored image has a negative half width. Drawn on the CPU, whose generator is the same on every machine.
        """
        generator = torch.Generator().manual_seed(_mix(seed, rank, epoch, batch))
        area, aspect, x, y, coin = torch.rand(5, num_images, generator=generator).unbind()
        low, high = self.crop_area or (1.0, 1.0)
        if self.crop_area is None:
            half_width = half_height = torch.ones(num_images)
        else:
            side = (low + (high - low) * area).sqrt()
            narrow, wide = (math.log(each) for each in self.crop_aspect)
            sample_range = (0.5 * (narrow + (wide - narrow) * aspect)).exp()
            half_width, half_height = (side * sample_range).clamp(max=1), (side / sample_range).clamp(max=1)
        center_x, center_y = (1 - half_width) * (2 * x - 1), (1 - half_height) * (2 * y - 1)
        half_width = torch.where(coin < self.flip, -half_width, half_width)
        return torch.stack([center_x, center_y, half_width, half_height], dim=1)


def _mix(*numbers: int) -> int:
    """One seed of several numbers; neighbours must not give related streams (a multiply-xorshift hash)."""
    mixed = 0
    for number in numbers:
        mixed = ((mixed ^ number) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64
        mixed ^= mixed >> 29
    return mixed % 2**63
