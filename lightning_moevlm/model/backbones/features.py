"""Pools features of samples: the backbone's tokens, averaged over real positions."""

from torch import Tensor

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.backbones.backbone import Backbone


def pool_features(backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
    """Return `image`, `text` and `pair`, (B, D) each, as far as the batch has them."""
    inputs = {
        "image": (batch.images_BRYX, None, None),
        "text": (None, batch.text_BL, batch.text_mask_BL),
        "pair": batch.first(batch.pairs)[:3],
    }
    needed = {"image": (0,), "text": (1,), "pair": (0, 1)}
    features: dict[str, Tensor] = {}
    for name, arguments in inputs.items():
        if all(arguments[position] is not None for position in needed[name]):
            output = backbone(*arguments)
            valid_BS1 = output.layout.valid_BS.unsqueeze(-1)
            features[name] = (output.tokens_BSD * valid_BS1).sum(dim=1) / valid_BS1.sum(dim=1).clamp(min=1)
    return features
