import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.images.augment import Augment

IMAGES = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_off_by_default_and_off_is_the_same_tensor() -> None:
    assert Augment().is_off
    assert Augment()(IMAGES, seed=0, rank=0, epoch=0, batch=0) is IMAGES


def test_a_certain_flip_is_a_mirror() -> None:
    assert torch.equal(Augment(flip=1.0)(IMAGES, 0, 0, 0, 0), IMAGES.flip(3))


def test_the_whole_image_at_its_own_aspect_is_unchanged() -> None:
    assert torch.equal(Augment(crop_area=(1, 1), crop_aspect=(1, 1))(IMAGES, 0, 0, 0, 0), IMAGES)


def test_a_crop_of_a_quarter_by_hand() -> None:
    # left half 0, right half 200: a crop of half the side sees at least one of them, and of columns 8-15 only 200
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[..., 8:] = 200
    augment = Augment(crop_area=(0.25, 0.25), crop_aspect=(1, 1))
    for batch in range(20):
        center_x, center_y, half_width, half_height = augment.boxes(1, 0, 0, 0, batch)[0].tolist()
        assert half_width == half_height == 0.5  # sqrt(0.25)
        assert abs(center_x) <= 0.5 and abs(center_y) <= 0.5
        # the middle of the image, 0 in [-1, 1], lies at share (0 - (center - 0.5)) / (2 * 0.5) of the crop
        edge = (0.5 - center_x) * 16
        columns = augment(image, 0, 0, 0, batch)[0, 0, 0]
        assert all(columns[x] == 0 for x in range(16) if x < edge - 2)
        assert all(columns[x] == 200 for x in range(16) if x > edge + 1)


def test_crops_keep_within_the_image_and_the_limits() -> None:
    boxes_BK = Augment(crop_area=(0.2, 0.6), crop_aspect=(0.5, 2.0), flip=0.5).boxes(4000, 0, 0, 0, 0)
    center, half = boxes_BK[:, :2], boxes_BK[:, 2:].abs()
    assert bool(((center.abs() + half) <= 1 + 1e-6).all())
    area, aspect = half.prod(1), half[:, 0] / half[:, 1]
    resolve_inside = (half < 1).all(1)  # not clipped to the image
    assert area.max() <= 0.6 + 1e-5 and area[resolve_inside].min() >= 0.2 - 1e-5
    assert aspect[resolve_inside].max() <= 2 + 1e-4 and aspect[resolve_inside].min() >= 0.5 - 1e-4
    assert area[resolve_inside].mean() == pytest.approx(0.4, abs=0.02)
    assert (boxes_BK[:, 2] < 0).float().mean() == pytest.approx(0.5, abs=0.03)  # 4 standard errors of 0.008


def test_draws_follow_from_seed_rank_epoch_and_batch_alone() -> None:
    augment = Augment(crop_area=(0.3, 1), flip=0.5)
    draw_caption = augment.boxes(6, 1, 2, 3, 4)
    torch.manual_seed(99)
    assert torch.equal(augment.boxes(6, 1, 2, 3, 4), draw_caption)
    others = [
        augment.boxes(6, *place)
        for place in ((2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (1, 2, 4, 3), (2, 1, 3, 4))
    ]
    assert all(not torch.equal(draw_caption, other) for other in others)
    assert torch.equal(augment(IMAGES, 1, 2, 3, 4), augment(IMAGES, 1, 2, 3, 4))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"crop_area": (0, 1)}, r"crop_area is \[0, 1\]"),
        ({"crop_area": (0.5, 0.2)}, "crop_area"),
        ({"crop_area": (0.5, 1.5)}, "crop_area"),
        ({"crop_aspect": (0, 1)}, "crop_aspect"),
        ({"flip": 1.5}, "flip is 1.5"),
    ],
)
def test_invalid_options_are_refused(options: dict, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        Augment(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same() -> None:
    augment = Augment(crop_area=(0.3, 1), flip=0.5)
    off = augment(IMAGES.cuda(), 0, 0, 0, 5).cpu().int() - augment(IMAGES, 0, 0, 0, 5).int()
    assert off.abs().max() <= 1  # rounding
