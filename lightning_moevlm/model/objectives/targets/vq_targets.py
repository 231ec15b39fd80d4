"""Discrete codes from the user's own visual tokeniser (VQ-VAE, VQ-KD, ...).

Export the encoder with `torch.export` and save it as `.pt2`; any architecture works. The program takes fp32 images
(B, 3, Y, X) in [0, 1] and returns int64 codes (B, P), patches row by row. A `.pt2` holds a graph of tensor operations
and weights. torch would also unpickle other content; such a file is refused here.
"""

import io
import logging
import pickle  # for the name of its error alone
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import BackboneSpec
from lightning_moevlm.model.objectives.targets.image_targets import Codes


class VQCheckpointTargets(Codes):
    """Codes of an exported VQ encoder, frozen.

    Args:
        spec: the backbone's dimensions.
        path: the `.pt2` file.
        num_codes: size of its codebook.

    Raises:
        UserError: the file is missing or not an exported program, or its codes do not fit the spec.
    """

    def __init__(self, spec: BackboneSpec, path: str, num_codes: int) -> None:
        super().__init__()
        self.num_classes = num_codes
        self.output_dim = num_codes
        self.path = path
        self.encoder = _load(Path(path))
        probe_BRYX = torch.zeros(2, 3, spec.image_size, spec.image_size, dtype=torch.uint8)
        codes_BP = self(probe_BRYX)
        if codes_BP.dtype != torch.int64 or codes_BP.shape != (2, spec.num_patches):
            raise UserError(
                f"{path} returned {codes_BP.dtype} of shape {tuple(codes_BP.shape)} for two images of "
                f"{spec.image_size} px; expected torch.int64 of shape (2, {spec.num_patches}): "
                "match image_size and patch_size to the encoder"
            )

    @torch.no_grad()
    def forward(self, images_BRYX: Tensor) -> Tensor:
        """Return (B, P) int64 codes."""
        codes_BP: Tensor = self.encoder(images_BRYX.float() / 255.0)
        if codes_BP.dtype == torch.int64 and codes_BP.numel():
            least, most = (int(code) for code in codes_BP.aminmax())
            if least < 0 or most >= self.num_classes:
                raise UserError(
                    f"{self.path} returned codes {least} to {most} with num_codes {self.num_classes}: allowed are 0 to "
                    f"{self.num_classes - 1}; raise num_codes, or export an encoder that numbers its codes from 0"
                )
        return codes_BP


def _load(path: Path) -> torch.nn.Module:
    advice = "save the encoder with torch.export.save(torch.export.export(encoder.eval(), (images,)), 'encoder.pt2')"
    if not path.is_file():
        raise UserError(f"{path} does not exist: {advice}")
    _refuse_pickles(path)
    chatter = logging.getLogger("torch.export")  # it logs the traceback of what it raises as well
    before, chatter.disabled = chatter.disabled, True
    try:
        program = torch.export.load(str(path))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not an exported program ({type(error).__name__}: {reason}): {advice}") from error
    finally:
        chatter.disabled = before
    return program.module().requires_grad_(False)


def _refuse_pickles(path: Path) -> None:
    """Refuse a file with members that are more than tensors: torch.export.load falls back to unpickling them."""
    if not zipfile.is_zipfile(path):
        return  # torch.export.load says what it is not
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            content = archive.read(member) if member.endswith((".pt", ".pkl", ".pth")) else b""
            if not content:
                continue
            try:
                torch.load(io.BytesIO(content), weights_only=True)
            except (pickle.UnpicklingError, RuntimeError) as error:
                raise UserError(
                    f"{path} holds {member}, which is not plain tensor data and could run code when loaded: export "
                    "the encoder again, on a machine that you trust"
                ) from error
