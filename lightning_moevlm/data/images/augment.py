"""Crops and flips a whole batch of images at once, on its device; both are off by default.

Each image has its own crop: area uniform in `crop_area`, aspect ratio log-uniform in `crop_aspect` (Inception, arXiv
1409.4842, as torchvision's RandomResizedCrop draws them, but clipped to the image instead of drawn again). Draws depend
on seed, rank, epoch and batch number alone, so a resumed run repeats those of the uninterrupted one, on any device.
Pixels stay uint8; the model scales them to [-1, 1].
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number


@dataclass(frozen=True)
class Augment:
    """Random crops and flips of training images.

    Args:
        crop_area: Smallest and largest area of a crop, as fractions of the image; null turns crops off.
        crop_aspect: Smallest and largest width / height of a crop.
        flip: Probability that an image is mirrored. Captions with "left" and "right" become false.
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
                f"data.augment.crop_aspect is {list(self.crop_aspect)}: give [smallest, largest], both above 0"
            )
        check_number("data.augment.flip", self.flip, least=0, most=1)

    @property
    def is_off(self) -> bool:
        """Whether images stay as they are."""
        return self.crop_area is None and self.flip == 0

    def __call__(self, images_BRYX: Tensor, seed: int, rank: int, epoch: int, batch: int) -> Tensor:
        """Return augmented images, uint8, of the same shape. batch: its number in the epoch of this rank."""
        if self.is_off:
            return images_BRYX
        boxes_BK = self.boxes(len(images_BRYX), seed, rank, epoch, batch).to(images_BRYX.device, non_blocking=True)
        center_x, center_y, half_width, half_height = boxes_BK.unbind(1)
        zero = torch.zeros_like(center_x)
        theta = torch.stack([half_width, zero, center_x, zero, half_height, center_y], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images_BRYX.shape), align_corners=False)
        # crops are only ever enlarged, so antialiasing is not needed
        seen = F.grid_sample(images_BRYX.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        return seen.round_().clamp_(0, 255).to(torch.uint8)

    def boxes(self, num_images: int, seed: int, rank: int, epoch: int, batch: int) -> Tensor:
        """Draw crops: (B, 4) fp32, centre x and y, half width and height; the image is [-1, 1] x [-1, 1].

        A mirrored image has a negative half width. The CPU draws, because its generator is the same on every machine.
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
    """Hash numbers to one seed (multiply-xorshift), so that neighbours do not give related streams."""
    mixed = 0
    for number in numbers:
        mixed = ((mixed ^ number) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64
        mixed ^= mixed >> 29
    return mixed % 2**63
