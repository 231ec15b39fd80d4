import sys
import types
import warnings

import numpy as np
import pytest
import simplejpeg
import torch

from lightning_moevlm.data.images import gpu_decode
from lightning_moevlm.data.images.decode import decode_image
from lightning_moevlm.data.images.gpu_decode import decode_batch, fit_all
from lightning_moevlm.data.images.jpeg_batch import Jpeg, JpegBatch
from lightning_moevlm.data.images.open_image import ImageTooLargeError

CPU = torch.device("cpu")
SHAPES = ((32, 32), (40, 56), (32, 32), (24, 20))


def _smooth(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 64 + 90], axis=2).astype(np.uint8)


def _jpegs() -> list[bytes]:
    return [bytes(simplejpeg.encode_jpeg(_smooth(*shape), 95, "RGB", "444")) for shape in SHAPES]


def _encoded(jpegs: list[bytes]) -> JpegBatch:
    return JpegBatch.pack([Jpeg(jpeg, f"{place}.jpg") for place, jpeg in enumerate(jpegs)])


@pytest.fixture(autouse=True)
def forgotten() -> None:
    gpu_decode._torchcodec.cache_clear()


def test_bytes_come_apart_as_they_were_put_together() -> None:
    jpegs = _jpegs()
    images = _encoded(jpegs)
    assert [each.numpy().tobytes() for each in images.split()] == jpegs
    assert len(images.bytes_N) == sum(map(len, jpegs))
    assert images.parts == (4,) and images.fresh == (True,) * 4


def test_those_of_several_sources_are_one_after_the_other() -> None:
    jpegs = _jpegs()
    first = JpegBatch.pack([Jpeg(jpeg, "a") for jpeg in jpegs[:1]], num_fresh=1)
    second = JpegBatch.pack([Jpeg(jpeg, "b") for jpeg in jpegs[1:]], num_fresh=2)
    images = JpegBatch.join([first, second])
    assert images is not None
    assert [each.numpy().tobytes() for each in images.split()] == jpegs
    assert images.names == ("a", "b", "b", "b") and images.parts == (1, 3)
    assert images.fresh == (True, True, True, False)
    assert JpegBatch.join([first]) is first and JpegBatch.join([]) is None


def test_the_cpu_gives_the_pixels_of_the_loader() -> None:
    jpegs = _jpegs()
    decoded, faults = decode_batch(_encoded(jpegs), 16, CPU)
    assert not faults
    assert torch.equal(decoded, torch.stack([decode_image(jpeg, "jpg", 16) for jpeg in jpegs]))


def test_faults_are_those_of_the_loader() -> None:
    jpegs = _jpegs()
    decoded, faults = decode_batch(_encoded([jpegs[0], b"no image", jpegs[1], jpegs[2][:200]]), 16, CPU)
    assert set(faults) == {1, 3} and all("JPEG" in str(fault) for fault in faults.values())
    assert torch.equal(decoded[2], decode_image(jpegs[1], "jpg", 16))
    # 32 x 32 and 24 x 20 pixels are allowed, 40 x 56 are too many
    assert {k: type(fault) for k, fault in decode_batch(_encoded(jpegs), 16, CPU, 1024).faults.items()} == {
        1: ImageTooLargeError
    }


def test_images_of_any_shape_are_fitted_like_one_by_one() -> None:
    jpegs = _jpegs()
    whole = [torch.from_numpy(simplejpeg.decode_jpeg(jpeg, "RGB")).permute(2, 0, 1) for jpeg in jpegs]
    fitted = fit_all(whole, 28)  # less than twice: the loader does not scale while it decodes either
    one_by_one = torch.stack([decode_image(jpeg, "jpg", 28) for jpeg in jpegs])
    assert fitted.shape == (4, 3, 28, 28) and fitted.dtype == torch.uint8
    assert (fitted.int() - one_by_one.int()).abs().max() <= 1  # floats against whole numbers


@pytest.mark.parametrize("error", [ImportError("no module"), OSError("libnvrtc.so.13 is not there")])
def test_without_torchcodec_one_warning(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise error

    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Broken("torchcodec.decoders"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert gpu_decode._torchcodec() is None
        assert gpu_decode._torchcodec() is None
    (warning,) = caught
    assert "decoded on the CPU" in str(warning.message) and "lightning-moevlm[gpu-decode]" in str(warning.message)


def test_the_cpu_finds_the_bad_images_of_a_batch_that_a_device_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(jpegs: list[torch.Tensor], mode: str, device: torch.device) -> list[torch.Tensor]:
        raise RuntimeError("nvjpegDecodeBatched failed: 5")

    monkeypatch.setattr(gpu_decode, "_torchcodec", lambda: refuses)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)  # there is no such device
    jpegs = _jpegs()
    decoded, faults = decode_batch(_encoded([jpegs[0], jpegs[1][:200]]), 16, torch.device("cuda"))
    assert set(faults) == {1}
    assert torch.equal(decoded[0], decode_image(jpegs[0], "jpg", 16))


def test_nothing_is_imported_before_it_is_needed() -> None:
    assert "torchcodec" not in sys.modules
    decode_batch(_encoded(_jpegs()), 16, CPU)
    assert "torchcodec" not in sys.modules


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_nearly_the_same() -> None:
    pytest.importorskip("torchcodec", reason="needs the extra gpu-decode", exc_type=Exception)
    device = torch.device("cuda", 0)
    jpegs = _jpegs()
    decoded = decode_batch(_encoded(jpegs).pin(), 28, device).images_BRYX
    assert decoded.device == device
    off = (decoded.cpu().int() - decode_batch(_encoded(jpegs), 28, CPU).images_BRYX.int()).abs()
    assert off.float().mean() < 2 and off.max() < 24  # two decoders' inverse cosine transforms
    assert set(decode_batch(_encoded([jpegs[0], b"no image"]), 28, device).faults) == {1}
