"""Estimates the costs of an adopted model from the sizes of its matrices: 2 FLOPs per number and token.

Not known here: convolutions of linear attention, and tokens that a sliding window leaves out.
"""

from typing import Any, NamedTuple

from torch import nn

from lightning_moevlm.contracts.model_card import Costs

CONNECTORS = ("merger", "projector", "connector", "aligner", "adapter", "deepstack_merger_list")
"""Beginnings of names of modules between vision tower and language model."""


class Sizes(NamedTuple):
    """Numbers in the matrices of the parts of a model, without embeddings, routers and routed experts."""

    vision: int
    connector: int
    language: int


class Lengths(NamedTuple):
    """Length of a sequence: patches that the vision tower embeds, tokens of the image, all tokens."""

    patches: int
    image: int
    total: int


def vision_parameters(model: Any) -> set[int]:
    """Return the ids of the parameters of the vision tower; empty if there is none."""
    encoder = model.get_encoder(modality="image")
    if encoder is model or encoder is model.base_model:
        return set()
    return {id(parameter) for parameter in encoder.parameters()}


def is_connector(name: str) -> bool:
    """Return whether a parameter's name is that of a part between vision tower and language model."""
    return any(piece.startswith(CONNECTORS) or piece.endswith(CONNECTORS) for piece in name.split("."))


def measure(model: Any, left_out: set[int]) -> Sizes:
    """Count the numbers of matrices by part; left_out: ids of parameters that are counted elsewhere."""
    seeing = vision_parameters(model)
    vision = connector = language = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2 and id(p) not in left_out)
        if is_connector(path):
            connector += size
        elif any(id(parameter) in seeing for parameter in module.parameters(recurse=False)):
            vision += size
        else:
            language += size
    return Sizes(vision, connector, language)


def costs_of(config: Any, sizes: Sizes, lengths: Lengths, dim: int) -> Costs:
    """Return the costs of everything but the mixtures, of one sequence; config: of the language model."""
    width = sum(_width_of_heads(layer, dim) for layer in _layers_of(config))  # of all layers
    embeddings = sizes.vision * lengths.patches + sizes.connector * lengths.image
    language = sizes.language * lengths.total
    return Costs(
        embeddings=2.0 * embeddings,
        attention=4.0 * lengths.total**2 * width,
        feed_forward=2.0 * language,
        kept_by_products=(embeddings + language) / dim,
    )


def _layers_of(config: Any) -> list[Any]:
    """Return the configuration of each layer; those of Gemma 4 and Step-3.7 differ in the size of their heads."""
    if getattr(config, "is_heterogeneous", False):
        return [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]
    return [config] * config.num_hidden_layers


def _width_of_heads(config: Any, dim: int) -> int:
    heads: int = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or dim // heads)
