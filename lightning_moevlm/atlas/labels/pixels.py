"""Names the colour of patches, of any image."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAMED_COLOURS: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("black", (0, 0, 0)),
    ("black", (50, 50, 50)),
    ("grey", (128, 128, 128)),
    ("grey", (200, 200, 200)),
    ("white", (255, 255, 255)),
    ("red", (200, 30, 30)),
    ("red", (230, 90, 90)),
    ("orange", (240, 140, 30)),
    ("orange", (255, 205, 145)),
    ("yellow", (250, 220, 40)),
    ("yellow", (255, 242, 165)),
    ("green", (40, 140, 50)),
    ("green", (185, 230, 180)),
    ("blue", (40, 80, 200)),
    ("blue", (170, 210, 255)),
    ("purple", (120, 50, 150)),
    ("purple", (215, 185, 245)),
    ("pink", (240, 110, 170)),
    ("pink", (255, 190, 205)),
    ("brown", (130, 80, 40)),
)
"""Names with examples, of strong and of pale ones; the nearest in RGB names a patch."""


def name_colours(images_BRYX: Tensor, grid: int) -> list[list[str]]:
    """Return the name of the mean colour of each patch of each image; grid: patches of a side."""
    mean_BRYX = F.adaptive_avg_pool2d(images_BRYX.float(), grid)
    patches_BPR = mean_BRYX.flatten(2).permute(0, 2, 1)
    examples = torch.tensor([rgb for _, rgb in NAMED_COLOURS], dtype=torch.float32, device=images_BRYX.device)
    nearest_BP = torch.cdist(patches_BPR, examples.expand(len(patches_BPR), -1, -1)).argmin(dim=-1)
    names = np.array([name for name, _ in NAMED_COLOURS])
    return [row.tolist() for row in names[nearest_BP.cpu().numpy()]]
