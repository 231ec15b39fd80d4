"""Asks a model of transformers for logits as its own forward pass makes them of features.

Families scale or cap their logits, divide the features, leave ids out, or have layers before the matrix. So the model's
own code runs, on a shallow copy whose body answers with features that were computed before.
"""

import copy
from typing import Any

from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError


def predict(model: Any, features: Tensor) -> Tensor:
    """Return logits, (..., V), of features (..., D) with at least one axis before the last.

    Args:
        model: with a head for next tokens.
        features: last hidden states of its body.

    Raises:
        UserError: a head that calls a part of the body, as those of BART and ProphetNet do.
    """
    features_BSD = features if features.ndim == 3 else features.reshape(1, -1, features.shape[-1])
    whole, prefix = copy.copy(model), model.base_model_prefix
    # its own dict, so that the model keeps its body
    object.__setattr__(whole, "_modules", {**model._modules, prefix: _Computed(getattr(model, prefix), features_BSD)})
    logits_BSV: Tensor = whole(inputs_embeds=features_BSD).logits
    return logits_BSV.reshape(*features.shape[:-1], logits_BSV.shape[-1])


class _Computed(nn.Module):
    """Answers with features; has the numbers, but not the parts, of the body in whose place it stands."""

    def __init__(self, body: nn.Module, features_BSD: Tensor) -> None:
        super().__init__()
        self._body, self._features_BSD = (body,), features_BSD  # in a tuple: not a part

    def __getattr__(self, name: str) -> Any:
        (body,) = self.__dict__["_body"]
        found = getattr(body, name)
        if isinstance(found, nn.Module):  # it would run instead of answering with the features
            raise UserError(
                f"the logits of models around {type(body).__name__} are made through its `{name}`, so they cannot be "
                "made of features alone: choose a model of another family"
            )
        return found

    def forward(self, *_: Any, **__: Any) -> "_Answer":
        return _Answer(last_hidden_state=self._features_BSD)


class _Answer(dict[str, Any]):
    """An output of transformers, None but for its first value."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)
