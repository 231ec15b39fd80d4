"""Encodes the images of a gallery, each once, as the model sees them."""

import base64
import io
import math
from collections.abc import Collection

from PIL import Image

from lightning_moevlm.atlas.probe.probe_set import ProbeSet

_BUDGET_BYTES = 10_000_000
_BYTES_PER_PIXEL = 0.3  # of a JPEG of this quality
_QUALITY = 82
_SIDES = (48, 224)


def encode_images(probe: ProbeSet, samples: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return a data address for the image of each sample; smaller images where there are many.

    Args:
        probe: the samples.
        samples: source and key of those that are shown.
    """
    if not samples:
        return {}
    affordable = int(math.sqrt(_BUDGET_BYTES / len(samples) / _BYTES_PER_PIXEL))
    side = min(max(affordable, _SIDES[0]), _SIDES[1])
    found: dict[tuple[str, str], str] = {}
    for each in probe.batches():
        for row, key in enumerate(each.batch.image_keys):
            place = (each.source, key)
            if place not in samples or each.batch.images_BRYX is None:
                continue
            image = Image.fromarray(each.batch.images_BRYX[row].permute(1, 2, 0).contiguous().numpy())
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            out = io.BytesIO()
            image.save(out, "JPEG", quality=_QUALITY)
            found[place] = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    return found
