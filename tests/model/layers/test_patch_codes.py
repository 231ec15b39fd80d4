"""Patch codes: fixed, the same for the same content, silent about hidden patches."""

from pathlib import Path

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.codebook import Codebook, save_codebook
from lightning_moevlm.model.layers import PatchCodes


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_codes_are_fixed_and_in_range() -> None:
    codes = PatchCodes(8)(images(), None)
    assert codes.shape == (2, 4) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < 2**10 and len(set(codes.flatten().tolist())) > 1
    assert torch.equal(PatchCodes(8)(images(), None), codes)
    assert PatchCodes(8).state_dict() == {}


def test_hidden_patches_say_nothing() -> None:
    hidden_BP = torch.tensor([[True, False, False, False], [False, False, False, True]])
    first, second = images(), images()
    second[0, :, :8, :8] = 0  # under the mask
    codes = PatchCodes(8)(first, hidden_BP)
    assert codes[0, 0] == codes[1, 3] == -1 and int((codes == -1).sum()) == 2
    assert torch.equal(PatchCodes(8)(second, hidden_BP), codes)


def test_a_codebook_gives_its_nearest_centre(tmp_path: Path) -> None:
    # standardised, a patch that grows along x is one centre and its mirror image the other
    ramp_Q = torch.arange(8.0).repeat(8, 1).repeat(3, 1, 1).flatten()
    ramp_Q = (ramp_Q - ramp_Q.mean()) / ramp_Q.std(correction=0)
    save_codebook(Codebook(torch.stack([ramp_Q, -ramp_Q]), 8, "digest"), tmp_path / "book.safetensors")
    codes = PatchCodes(8, codebook=str(tmp_path / "book.safetensors"))
    image = (torch.arange(16).repeat(16, 1) * 10).to(torch.uint8).expand(1, 3, 16, 16)
    assert codes(image, None).tolist() == [[0, 0, 0, 0]]
    assert codes(image.flip(-1), None).tolist() == [[1, 1, 1, 1]]
    with pytest.raises(UserError, match="for patches of 8 px, the model's have 4"):
        PatchCodes(4, codebook=str(tmp_path / "book.safetensors"))
