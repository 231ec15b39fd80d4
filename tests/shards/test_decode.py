import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.collate import Collate
from lightning_moevlm.shards.decode import decode_image
from lightning_moevlm.shards.source import RawSample
from lightning_moevlm.shards.tokenizer import BOS, EOS, load_tokenizer, train_tokenizer


def _halves(height: int, width: int) -> np.ndarray:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return pixels


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (48, 96), (20, 20), (31, 77)])
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_any_size_becomes_the_wanted_one(shape: tuple[int, int], extension: str) -> None:
    pixels = _halves(*shape)
    if extension == "jpg":
        data = simplejpeg.encode_jpeg(pixels, 95, "RGB", "444")
    else:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "png")
        data = out.getvalue()
    image_RYX = decode_image(data, extension, 32)
    assert image_RYX.shape == (3, 32, 32)
    assert image_RYX.dtype == torch.uint8
    red, blue = image_RYX[:, 16, 4].tolist(), image_RYX[:, 16, 27].tolist()
    assert red[0] > 240 and red[2] < 15
    assert blue[2] > 240 and blue[0] < 15


def test_lossless_png_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    assert torch.equal(decode_image(out.getvalue(), "png", 16), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_rubbish_is_a_user_error_that_names_the_sample(extension: str, tmp_path) -> None:
    tokenizer = load_tokenizer(tmp_path, train_tokenizer(["a"], 260, tmp_path))
    collate = Collate((extension,), tokenizer, 16, 8)
    with pytest.raises(UserError, match=f"k1.{extension} in shard x.tar cannot be decoded"):
        collate([RawSample("k1", "x.tar", {extension: b"no picture"})])
    with pytest.raises(UserError, match=f"k1 in shard x.tar has no .{extension}"):
        collate([RawSample("k1", "x.tar", {})])


def test_a_batch_holds_what_the_set_has(tmp_path) -> None:
    tokenizer = load_tokenizer(tmp_path, train_tokenizer(["a"], 260, tmp_path))
    jpg = simplejpeg.encode_jpeg(_halves(16, 16), 95, "RGB", "444")
    raw = [
        RawSample("k1", "x.tar", {"jpg": jpg, "txt": b" a \n"}),
        RawSample("k2", "x.tar", {"jpg": jpg, "txt": b""}),
    ]
    both = Collate(("jpg", "json", "txt"), tokenizer, 16, 4)
    assert both.wanted == {"jpg", "txt"}
    images_BRYX, text_BL, text_mask_BL, keys = both(raw)
    assert images_BRYX is not None and images_BRYX.shape == (2, 3, 16, 16) and images_BRYX.dtype == torch.uint8
    (a,) = tokenizer.ids("a")
    assert text_BL is not None and text_BL.tolist() == [[BOS, a, EOS, 0], [BOS, EOS, 0, 0]]
    assert text_mask_BL is not None and text_mask_BL.tolist() == [
        [True, True, True, False],
        [True, True, False, False],
    ]
    assert keys == ("k1", "k2")
    assert Collate(("txt",), tokenizer, 16, 4)(raw).images_BRYX is None
    only_images = Collate(("jpg",), tokenizer, 16, 4)(raw)
    assert only_images.text_BL is None and only_images.text_mask_BL is None
