"""The sample of an audit: images and texts of a set, texts of a file, or scenes drawn for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_moevlm.contracts.batch import Batch
    from lightning_moevlm.data.format.manifest import Manifest
    from lightning_moevlm.data.storage.shard_storage import ShardStorage
    from lightning_moevlm.data.text.captions import Captions

_SMALLEST_SCENE, _LARGEST_SCENE = 64, 224
_NUM_DRAWINGS = 24


class Wanted(NamedTuple):
    """How many samples, and the size of images in pixels; None for a model without a vision tower."""

    num_samples: int
    image_size: int | None


class Sample(NamedTuple):
    """Texts, each with its image or all without, and where they come from."""

    texts: list[str]
    images: "list[Tensor]"
    origin: str


def check_source(data: str | None, texts: str | None) -> None:
    """Refuse a source that cannot be read, before a model is loaded.

    Raises:
        UserError: two sources, or one that is not there or has no texts.
    """
    if data is not None and texts is not None:
        raise UserError("give --data or --texts, not both")
    if texts is not None:
        _read_texts(texts, Wanted(2, None))
    if data is not None:
        _open_set(data)


def draw_sample(data: str | None, texts: str | None, wanted: Wanted) -> Sample:
    """Return the sample.

    Raises:
        UserError: a source without texts.
    """
    found = _read_texts(texts, wanted) if texts else _read_set(data, wanted) if data else _draw_scenes(wanted)
    even = len(found.texts) - len(found.texts) % 2
    if not even:
        raise UserError(f"{len(found.texts)} {found.origin}: an audit needs at least 2 texts")
    return Sample(found.texts[:even], found.images[:even], f"{even} {found.origin}")


def make_batches(
    model: Any, path: str | None, sample: Sample, batch_size: int, device: str
) -> "tuple[list[Batch], str]":
    """Return the batches of a sample, and by what its texts became ids."""
    import torch

    from lightning_moevlm.contracts.batch import Batch
    from lightning_moevlm.model.backbones.adopted.audit.open_model import encode_texts

    text_BL, mask_BL, by = encode_texts(model, path, sample.texts)
    batches = []
    for start in range(0, len(sample.texts), batch_size):
        rows = slice(start, start + batch_size)
        images = torch.stack(sample.images[rows]).to(device) if sample.images else None
        keys = tuple(str(number) for number in range(len(text_BL))[rows])
        batches.append(Batch(images, text_BL[rows].to(device), mask_BL[rows].to(device), keys))
    return batches, by


def _read_texts(file: str, wanted: Wanted) -> Sample:
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts {file} cannot be read: {error}; give a text file with one text per line") from error
    texts = [line.strip() for line in lines if line.strip()][: wanted.num_samples]
    return Sample(texts, [], f"texts of {file}")


def _open_set(data: str) -> "tuple[ShardStorage, Manifest, Captions]":
    from lightning_moevlm.data.storage.shard_storage import ShardStorage
    from lightning_moevlm.data.text.captions import find_captions

    storage = ShardStorage(data)
    manifest = storage.read_manifest()
    captions = find_captions(manifest.members, manifest.layout.caption_field)
    if captions is None:
        raise UserError(f"{storage} has no captions: give a set with texts, or leave --data out")
    return storage, manifest, captions


def _read_set(data: str, wanted: Wanted) -> Sample:
    from lightning_moevlm.data.format.shard_reader import RawSample, read_shard, require_all
    from lightning_moevlm.data.images.decode import decode_image, image_kind

    storage, manifest, captions = _open_set(data)
    image = next((member for member in manifest.members if image_kind(member) is not None), None)

    def read() -> Iterator[RawSample]:
        for shard in manifest.splits["train"]:
            yield from require_all(read_shard(storage, shard, frozenset(manifest.members), manifest.layout))

    texts: list[str] = []
    images: list[Tensor] = []
    for sample in read():
        if len(texts) == wanted.num_samples:
            break
        found = captions.read(sample.members[captions.member])
        if not found:
            continue
        texts.append(found[0])
        if image is not None and wanted.image_size is not None:
            kind = image_kind(image)
            assert kind is not None
            images.append(decode_image(sample.members[image], kind, wanted.image_size))
    what = "pairs" if images else "captions"
    return Sample(texts, images, f"{what} of the training split of {storage}")


def _draw_scenes(wanted: Wanted) -> Sample:
    from lightning_moevlm.data.images.decode import decode_image
    from lightning_moevlm.data.write.demo.drawing_catalogue import first_drawings
    from lightning_moevlm.data.write.demo.scenes import Painter, make_sample

    size = wanted.image_size or _SMALLEST_SCENE
    world, painter = first_drawings(_NUM_DRAWINGS), Painter(min(max(size, _SMALLEST_SCENE), _LARGEST_SCENE))
    scenes = [make_sample(number, world, painter, "png", seed=0) for number in range(wanted.num_samples)]
    texts = [scene.caption for scene in scenes if scene.caption is not None]
    images = (
        [] if wanted.image_size is None else [decode_image(each.image, "png", size) for each in scenes if each.image]
    )
    what = "scenes with their captions" if images else "captions of scenes"
    return Sample(texts, images, f"{what}, drawn for this (moevlm data build scenes)")
