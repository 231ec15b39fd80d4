"""Parts of a batch: further captions follow their images."""

import torch

from lightning_moevlm.contracts.batch import Batch, FurtherCaptions


def several_captions() -> Batch:
    """Three pairs; the first has two further captions, the last one."""
    image_BRYX = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    text_BL, text_ML = (
        torch.tensor([[2, 10, 3], [2, 20, 3], [2, 30, 3]]),
        torch.tensor([[2, 11, 3], [2, 31, 3], [2, 12, 3]]),
    )
    further = FurtherCaptions(text_ML, text_ML != 0, (0, 2, 0))
    return Batch(image_BRYX, text_BL, text_BL != 0, ("a", "b", "c"), 3, ("s", "s", "t"), further_captions=further)


def said(batch: Batch) -> list[tuple[str, int]]:
    """(key of the image, word) of every further caption."""
    further = batch.further_captions
    return (
        []
        if further is None
        else [(batch.keys[p], int(w)) for p, w in zip(further.pairs, further.text_ML[:, 1], strict=True)]
    )


def test_further_captions_go_with_their_images() -> None:
    batch = several_captions()
    assert said(batch.select([2, 0])) == [("c", 31), ("a", 11), ("a", 12)]
    assert said(batch.first(1)) == [("a", 11), ("a", 12)]
    assert said(batch.of_sources({"t"})) == [("c", 31)]
    assert batch.select([1]).further_captions is None


def test_each_caption_becomes_a_pair_with_a_copy_of_its_image() -> None:
    every = several_captions().each_caption()
    assert every.images_BRYX is not None and every.text_BL is not None and every.text_mask_BL is not None
    assert every.text_BL[:, 1].tolist() == [10, 20, 30, 11, 31, 12]
    assert every.images_BRYX[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 2, 0]
    assert every.keys == ("a", "b", "c", "a#1", "c#1", "a#2")
    assert every.pairs == 6 and every.text_mask_BL.shape == (6, 3)
    assert every.sources == ("s", "s", "t", "s", "t", "s") and every.further_captions is None
    plain = several_captions()._replace(further_captions=None)
    assert plain.each_caption() is plain
