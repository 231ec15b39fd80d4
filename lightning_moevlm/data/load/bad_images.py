"""Handles images that fail to decode on the device, after their batch has been assembled.

The loader's process checks the beginning and the end of an image, and replaces a bad one by the next of its stream.
Damage in between appears on the device, when the stream has gone on. A run without tolerance for losses ends.
Otherwise the sample counts as lost, for the same cause as if the CPU had decoded it.

- In training, a copy of a neighbour (image, text and key) takes its place. It comes from the same source if possible,
  else it is of the same kind (pair or image alone). Every rank keeps its number of samples, every text its image.
- In evaluation it is left out, because every sample counts once.
"""

from collections import Counter
from collections.abc import Sequence

from lightning_moevlm.data.format.faults import Cause, Lost, decode_fault, lost_batch_error, lost_sample_error
from lightning_moevlm.data.images.gpu_decode import Pixels
from lightning_moevlm.data.images.jpeg_batch import JpegBatch
from lightning_moevlm.data.images.open_image import ImageTooLargeError
from lightning_moevlm.data.read.reader import Delivery, Failure


def insert_pixels(
    delivery: Delivery, images: JpegBatch, pixels: Pixels, tolerant: bool, fills: bool
) -> Delivery | Failure:
    """Put decoded images into their batch, and account for those that failed.

    Args:
        delivery: The batch with its losses so far.
        images: Its encoded images.
        pixels: Its decoded images.
        tolerant: Whether samples may be lost.
        fills: Whether lost samples are replaced; otherwise they are left out.
    """
    delivery = delivery._replace(batch=delivery.batch._replace(images_BRYX=pixels.images_BRYX), jpegs=None)
    if not pixels.faults:
        return delivery
    lost = {place: _make_lost(images.names[place], error) for place, error in pixels.faults.items()}
    last = lost[max(lost)]
    if not tolerant:
        return Failure(str(lost_sample_error(lost[min(lost)])))
    good = [place for place in range(images.num_images) if place not in lost]
    kept = _find_neighbours(good, images.parts, delivery.batch.pairs) if fills else good
    if not kept and not fills:
        return Failure(str(lost_batch_error(images.num_images, last.message)))
    if not kept:
        return Failure(
            f"a batch has no image of the same kind left to replace a bad one: {last.message} (or set data.decode cpu, "
            "which takes the next sample instead, or raise data.batch_size)"
        )
    counted = Counter[Cause](delivery.lost)
    counted.update(each.cause for place, each in lost.items() if images.fresh[place])
    batch = delivery.batch
    rows = [*kept, *range(images.num_images, batch.num_samples)]  # texts alone are not touched
    batch = batch.select(rows)._replace(num_cut=batch.num_cut)
    return delivery._replace(batch=batch, lost=dict(counted), last_error=last.message)


def _make_lost(name: str, error: ValueError) -> Lost:
    cause: Cause = "image_too_large" if isinstance(error, ImageTooLargeError) else "image_undecodable"
    return Lost(1, cause, str(decode_fault(cause, name, error)))


def _find_neighbours(good: Sequence[int], parts: Sequence[int], pairs: int) -> list[int]:
    """Return the nearest good image of its kind for each image, its own source first; empty if a kind has none."""
    source = [k for k, part in enumerate(parts) for _ in range(part)]
    found: list[int] = []
    for place in range(len(source)):
        alike = [other for other in good if (other < pairs) == (place < pairs)]
        if not alike:
            return []
        found.append(min(alike, key=lambda other: (source[other] != source[place], abs(other - place))))
    return found
