"""Members of other names and formats: found by options, and never ignored."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.layout import Layout
from lightning_moevlm.data.format.manifest import SPLITS
from lightning_moevlm.data.images.decode import decode_image
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.inspect.html_page import write_page
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.sources.member_names import MemberNames
from tests.data.found_tars import (
    BOTH,
    Files,
    flat,
    folder_of,
    keep,
    num_samples,
    read_set,
    sample,
    three_tars,
)
from tests.data.sources import make_image


def rename_extensions(tars: list[Files], **names: str) -> list[Files]:
    """The same samples with other extensions."""
    return [
        [(f"{key}.{names.get(extension, extension)}", data) for (key, _, extension), data in _parted(files)]
        for files in tars
    ]


def _parted(files: Files) -> Iterator[tuple[tuple[str, str, str], bytes]]:
    for name, data in files:
        yield name.partition("."), data


@BOTH
@pytest.mark.parametrize("extension", ["caption", "text", "caption.txt", "cls"])
def test_captions_under_another_extension_are_not_ignored(tmp_path: Path, convert_it, extension: str) -> None:  # type: ignore[no-untyped-def]
    folder = folder_of(tmp_path / "in", *rename_extensions(three_tars(), txt=extension))
    with pytest.raises(UserError, match=rf"part-0\.tar: samples have no \.txt.* give --caption_member {extension}, or"):
        convert_it(folder, tmp_path / "set")
    manifest = convert_it(folder, tmp_path / "set", names=MemberNames(caption=extension)).manifest
    assert manifest.members == ("jpg", "txt")
    check_set(ShardStorage(str(tmp_path / "set")))
    batch = next(iter(read_set(tmp_path / "set").val_dataloader()))
    assert batch.text_BL is not None and batch.images_BRYX is not None
    alone = convert_it(folder, tmp_path / "alone", names=MemberNames(caption=None)).manifest
    assert alone.members == ("jpg",)


@BOTH
def test_images_under_a_longer_extension_are_named(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
    folder = folder_of(tmp_path / "in", *rename_extensions(three_tars(), jpg="input.jpg", txt="outputs.txt"))
    with pytest.raises(UserError, match=r"only \.input\.jpg, \.outputs\.txt; .* try --image_member input\.jpg"):
        convert_it(folder, tmp_path / "set")
    names = MemberNames(image="input.jpg", caption="outputs.txt")
    assert num_samples(convert_it(folder, tmp_path / "set", names=names)) == 60
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()


@BOTH
def test_dots_in_keys_are_refused_with_a_remedy(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
    tars = [flat(*(sample(10 * t + i, f"v1.{t}.{i}") for i in range(10))) for t in range(3)]
    with pytest.raises(UserError, match=r"only \.0\.0\.jpg, .* and 16 more; .* no key has a dot in it"):
        convert_it(folder_of(tmp_path / "in", *tars), tmp_path / "set")


def test_images_of_several_formats_are_trained_on_as_they_are(tmp_path: Path) -> None:
    tars = three_tars()
    for files in tars:
        files[0], files[2] = ("a.png", make_image(600, "png")), ("b.webp", make_image(601, "webp"))
        files[1], files[3] = ("a.txt", b"a PNG"), ("b.txt", b"a WebP")
    folder = folder_of(tmp_path / "in", *tars)
    manifest = keep(folder, tmp_path / "set").manifest
    assert manifest.members == ("image", "txt")
    assert manifest.layout == Layout({"image": ("jpg", "png", "webp")}, "", keys_repeat=True)
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()
    (batch, *_) = read_set(tmp_path / "set").val_dataloader()
    assert batch.images_BRYX is not None
    assert [key.rpartition("/")[2] for key in batch.keys[:3]] == [
        "a",
        "b",
        next(iter(batch.keys[2:])).rpartition("/")[2],
    ]
    for row, (number, kind) in enumerate(((600, "png"), (601, "webp"))):
        assert torch.equal(batch.images_BRYX[row], decode_image(make_image(number, kind), "image", 16))


def test_images_of_several_formats_are_shown(tmp_path: Path) -> None:
    kinds = ("webp", "png", "jpg")
    tars = [
        flat(*([(f"{t}.{kind}", make_image(t, kind)), (f"{t}.txt", b"a thing")] for t in range(3))) for kind in kinds
    ]
    manifest = keep(folder_of(tmp_path / "in", *tars), tmp_path / "set").manifest
    assert manifest.members == ("image", "txt")
    storage = ShardStorage(str(tmp_path / "set"))
    for split in SPLITS:
        (sample, *_) = write_page(storage, split, 1, None, tmp_path / "page.html").samples
        kind = kinds[int(manifest.splits[split][0].file[5])]
        mime = f"image/{'jpeg' if kind == 'jpg' else kind}"
        (image,) = sample.images
        assert sample.faults == ()
        assert image.data_uri == f"data:{mime};base64,{base64.b64encode(make_image(0, kind)).decode()}"
