"""Pools features of samples: the backbone's tokens, averaged over real positions; of conversations where there are."""

from torch import Tensor

from lightning_moevlm.contracts.batch import Batch, join_chats
from lightning_moevlm.model.backbones.backbone import Backbone, BackboneOutput


def pool_features(backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
    """Return `image`, `text` and `pair`, (B, D) each, as far as the batch has them."""
    if batch.chats is not None:
        parts = {"pair": batch.chats[: batch.pairs], "text": batch.chats[batch.pairs :]}
        return {name: _pool(backbone.read_chats(join_chats(chats))) for name, chats in parts.items() if chats}
    inputs = {
        "image": (batch.images_BRYX, None, None),
        "text": (None, batch.text_BL, batch.text_mask_BL),
        "pair": batch.first(batch.pairs)[:3],
    }
    needed = {"image": (0,), "text": (1,), "pair": (0, 1)}
    features: dict[str, Tensor] = {}
    for name, arguments in inputs.items():
        if all(arguments[position] is not None for position in needed[name]):
            features[name] = _pool(backbone(*arguments))
    return features


def _pool(output: BackboneOutput) -> Tensor:
    valid_BS1 = output.layout.valid_BS.unsqueeze(-1)
    return (output.tokens_BSD * valid_BS1).sum(dim=1) / valid_BS1.sum(dim=1).clamp(min=1)
